/* x86 with AVX2 and AVX-VNNI: unsigned with signed bytes in one instruction. */
#include <immintrin.h>

#define BIAS 1
static inline __attribute__((always_inline)) __m256i add_dots(__m256i sums, __m256i weights, __m256i activations) {
    return _mm256_dpbusd_avx_epi32(sums, weights, activations);
}
#include "avx2_body.h"

LEVEL(avx2vnni);
