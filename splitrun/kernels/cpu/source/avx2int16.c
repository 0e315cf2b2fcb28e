/* Products of many rows in 16-bit integers, x86 with AVX2 alone. */
#include "words256.h"

ALWAYS_INLINE words add_pairs(words sums, words weights, words activations) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(weights, activations));
}
#include "integer_body.h"

const struct many many_avx2int16 = {"avx2int16", INT16_PRODUCTS, 1, 0, 0, pack, expand, multiply, store_panel, spin, 0};
