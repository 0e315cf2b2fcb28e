/* Products of many rows in 16-bit integers, x86 with AVX2 and AVX-VNNI. */
#include "words256.h"

ALWAYS_INLINE words add_pairs(words sums, words weights, words activations) {
    return _mm256_dpwssd_avx_epi32(sums, weights, activations);
}
#include "integer_body.h"

const struct many many_avx2vnniint16 = {"avx2vnniint16", INT16_PRODUCTS, 1, 0, 0, pack, expand, multiply, store_panel,
                                        spin, 0};
