/* Products of many rows in 16-bit integers, x86 with AVX-512 VNNI: registers of sixteen sums, a tile of outputs each. */
#include <immintrin.h>

#include "panels.h"
#include "x86_words.h"

#define WORDS 16
#define NEXT_WORDS TILE_LINES
#define KEEP(register) __asm__ volatile("" : "+v"(register))

typedef __m512i words;

ALWAYS_INLINE words no_words(void) { return _mm512_setzero_si512(); }
ALWAYS_INLINE words load_words(const uint8_t *from) { return _mm512_loadu_si512(from); }
ALWAYS_INLINE words same_words(const void *from) { return _mm512_set1_epi32(word_at(from)); }

ALWAYS_INLINE words add_pairs(words sums, words weights, words activations) {
    return _mm512_dpwssd_epi32(sums, weights, activations);
}

ALWAYS_INLINE void add_scaled(words dots, const float *scales, float x_scale, float *sums, int add) {
    __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(x_scale));
    __m512 before = add ? _mm512_loadu_ps(sums) : _mm512_setzero_ps();
    _mm512_storeu_ps(sums, _mm512_add_ps(before, _mm512_mul_ps(_mm512_cvtepi32_ps(dots), factor)));
}
#include "integer_body.h"

const struct many many_avx512int16 = {"avx512int16", INT16_PRODUCTS, 1, 0, 0, pack, expand, multiply, store_panel, spin, 0};
