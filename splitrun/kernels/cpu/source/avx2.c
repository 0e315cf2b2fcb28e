/* x86 with AVX2 alone. Pairs of products are summed in 16 bits: at most 2 * 128 * 127 (a stored code may be -128), which
 * fits, because the unsigned factor is the weight's magnitude and its sign goes to the activation. */
#include <immintrin.h>

#define BIAS 0
static inline __attribute__((always_inline)) __m256i add_dots(__m256i sums, __m256i weights, __m256i activations) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(activations, weights));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#include "avx2_body.h"

LEVEL(avx2);
