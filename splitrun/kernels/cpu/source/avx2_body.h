/* x86 with 256-bit registers: a line is two halves of 8 rows. The including file defines BIAS (weights shifted by 128,
 * undone by the activations' offsets) and add_dots(sums, weights, activations). */
#include <immintrin.h>

#include "x86_words.h"

#define OWN_EXPAND
ALWAYS_INLINE __m256 nf4_values(__m256i indices) {
    __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(nf4_table), indices); /* looks at three bits */
    __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(nf4_table + 8), indices);
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28)));
}

ALWAYS_INLINE void nf4_expand(const uint8_t *codes, int64_t stride, float scale, float *values) {
    const __m256 factor = _mm256_set1_ps(scale);
    for (int half = 0; half < 2; half++) {
        __m128i words = four_lines(codes + half * 4 * stride, stride);
        for (int pair = 0; pair < 2; pair++, words = _mm_srli_si128(words, 8)) {
            __m256i both = _mm256_cvtepu8_epi32(words);
            __m256 low = _mm256_mul_ps(nf4_values(both), factor);
            __m256 high = _mm256_mul_ps(nf4_values(_mm256_srli_epi32(both, 4)), factor);
            _mm256_storeu_ps(values + half * 32 + pair * 16, _mm256_permute2f128_ps(low, high, 0x20));
            _mm256_storeu_ps(values + half * 32 + pair * 16 + 8, _mm256_permute2f128_ps(low, high, 0x31));
        }
    }
}

ALWAYS_INLINE void int8_expand(const uint8_t *codes, int64_t stride, float scale, float *values) {
    const __m256 factor = _mm256_set1_ps(scale);
    __m128i words = four_lines(codes, stride);
    __m256 first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(words));
    __m256 second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(words, 8)));
    _mm256_storeu_ps(values, _mm256_mul_ps(first, factor));
    _mm256_storeu_ps(values + 8, _mm256_mul_ps(second, factor));
}
#include "attend.h"
#include "dense.h"
#include "values.h"
#include "vectors.h"

ALWAYS_INLINE __m256i four_columns(const int8_t *codes) {
    return _mm256_set1_epi32(word_at(codes));
}

ALWAYS_INLINE __m256i first_sum(const struct activations *x, int row, int64_t group) {
    return BIAS ? _mm256_set1_epi32(x->offsets[row * x->group_stride + group]) : _mm256_setzero_si256();
}

ALWAYS_INLINE void add_group(__m256i dots, __m256 scale, float *sums) {
    __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(dots), scale);
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), product));
}

ALWAYS_INLINE void nf4_rows(const int rows, const uint8_t *lines, int64_t columns, const struct activations *x,
                            float *sums) {
    const __m256i low_half = _mm256_set1_epi8(15), shift = _mm256_set1_epi8((char)(BIAS ? 128 : 0));
    const __m256i signed_book = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)nf4_codes));
    const __m256i book = _mm256_xor_si256(signed_book, shift);
    for (int64_t group = 0; group < columns / GROUP; group++, lines += GROUP_LINES * LINE) {
        const int8_t *codes = x->codes + group * GROUP;
        __m256i dots[4][2];
        for (int row = 0; row < rows; row++) dots[row][0] = dots[row][1] = first_sum(x, row, group);
        for (int line = 0; line < 8; line++) {
            fetch_both(lines + line * LINE);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)(lines + line * LINE + half * 32));
                __m256i low = _mm256_shuffle_epi8(book, _mm256_and_si256(both, low_half));
                __m256i high = _mm256_shuffle_epi8(book, _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half));
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const int8_t *eight = codes + row * x->code_stride + line * 8;
                    dots[row][half] = add_dots(dots[row][half], low, four_columns(eight));
                    dots[row][half] = add_dots(dots[row][half], high, four_columns(eight + 4));
                }
            }
        }
        fetch_both(lines + 8 * LINE);
        for (int row = 0; row < rows; row++) {
            const float *scales = (const float *)(lines + 8 * LINE);
            __m256 scale = _mm256_set1_ps(x->scales[row * x->group_stride + group]);
            add_group(dots[row][0], _mm256_mul_ps(_mm256_loadu_ps(scales), scale), sums + row * TILE);
            add_group(dots[row][1], _mm256_mul_ps(_mm256_loadu_ps(scales + 8), scale), sums + row * TILE + 8);
        }
    }
}

ALWAYS_INLINE void int8_rows(const int rows, const uint8_t *lines, int64_t columns, const struct activations *x,
                             float *sums) {
    const __m256i shift = _mm256_set1_epi8((char)(BIAS ? 128 : 0));
    for (int64_t start = 0; start < columns; start += GROUP) {
        const int8_t *codes = x->codes + start;
        int count = columns - start < GROUP ? (int)(columns - start) / 4 : GROUP / 4;
        __m256i dots[4][2];
        for (int row = 0; row < rows; row++) dots[row][0] = dots[row][1] = first_sum(x, row, start / GROUP);
        for (int line = 0; line < count; line++, lines += LINE) {
            fetch_both(lines);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                __m256i four = _mm256_loadu_si256((const __m256i *)(lines + half * 32));
                four = _mm256_xor_si256(four, shift);
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++)
                    dots[row][half] =
                        add_dots(dots[row][half], four, four_columns(codes + row * x->code_stride + line * 4));
            }
        }
        for (int row = 0; row < rows; row++) {
            __m256 scale = _mm256_set1_ps(x->scales[row * x->group_stride + start / GROUP]);
            add_group(dots[row][0], scale, sums + row * TILE);
            add_group(dots[row][1], scale, sums + row * TILE + 8);
        }
    }
}

#define MOST_AT_ONCE 4
#include "rows.h"
