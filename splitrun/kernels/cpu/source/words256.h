/* Registers of eight sums, for integer_body.h. */
#include <immintrin.h>

#include "kernels.h"
#include "x86_words.h"

#define WORDS 8
#define NEXT_WORDS 32 /* bytes from a register of a line to the next */
#define KEEP(register) __asm__ volatile("" : "+x"(register))

typedef __m256i words;

ALWAYS_INLINE words no_words(void) { return _mm256_setzero_si256(); }
ALWAYS_INLINE words load_words(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
ALWAYS_INLINE words same_words(const void *from) { return _mm256_set1_epi32(word_at(from)); }

/* sums = or += dots times the scales of outputs and of the row. */
ALWAYS_INLINE void add_scaled(words dots, const float *scales, float x_scale, float *sums, int add) {
    __m256 factor = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(x_scale));
    __m256 before = add ? _mm256_loadu_ps(sums) : _mm256_setzero_ps();
    _mm256_storeu_ps(sums, _mm256_add_ps(before, _mm256_mul_ps(_mm256_cvtepi32_ps(dots), factor)));
}
