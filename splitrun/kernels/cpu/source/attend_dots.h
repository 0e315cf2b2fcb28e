/* Attention to bf16 and int8 keys and values with AVX-512 BF16: twice the products of fp32 an instruction; bf16 need not
 * be widened, and every code of int8 is a number of bf16. Queries and weights are rounded to bf16, as torch's bf16
 * attention does; sums are fp32. */
#ifndef SPLITRUN_ATTEND_DOTS_H
#define SPLITRUN_ATTEND_DOTS_H

#include <immintrin.h>

#include "lanes.h"

#define PAIRS 32 /* columns of a register */

/* A register of keys or values, from the index-th value on. */
ALWAYS_INLINE __m512i thirty_two(const void *values, const int dtype, int64_t index) {
    if (dtype == BF16) return _mm512_loadu_si512((const uint16_t *)values + index);
    const __m128i *codes = (const __m128i *)((const int8_t *)values + index);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* As score_strip, with the queries in bf16. */
ALWAYS_INLINE void dot_strip(const struct view *view, const int dtype, const int heads, const struct stretch *stretch,
                             int start, const uint16_t *query, lanes *quarters_of) {
    int64_t first = (stretch->first + start) * view->width;
    int64_t upcoming = (stretch->upcoming + start) * view->width;
    __m512 sums[HEAD_STRIP][KEY_STRIP];
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int key = 0; key < KEY_STRIP; key++) sums[head][key] = _mm512_setzero_ps();
    for (int i = 0; i < view->width; i += PAIRS) {
        __m512bh values[KEY_STRIP];
#pragma GCC unroll 4
        for (int key = 0; key < KEY_STRIP; key++) {
            int there = start + key < stretch->count ? key : 0;
            values[key] = (__m512bh)thirty_two(view->keys, dtype, first + there * view->width + i);
            fetch(view->keys, dtype, upcoming + key * view->width + i);
        }
#pragma GCC unroll 6
        for (int head = 0; head < heads; head++) {
            __m512bh part = (__m512bh)_mm512_loadu_si512(query + head * view->width + i);
#pragma GCC unroll 4
            for (int key = 0; key < KEY_STRIP; key++)
                sums[head][key] = _mm512_dpbf16_ps(sums[head][key], values[key], part);
        }
    }
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++) {
        lanes four[KEY_STRIP];
#pragma GCC unroll 4
        for (int key = 0; key < KEY_STRIP; key++) four[key] = (lanes)sums[head][key];
        quarters_of[head * 4] = four_sums(four);
    }
}

/* A head's weights to bf16, in the first half of their memory. */
ALWAYS_INLINE void to_bf16_in_place(float *weights) {
    for (int key = 0; key < KEYS_AT_ONCE; key += LANES)
        _mm256_storeu_si256((__m256i *)((uint16_t *)weights + key), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights + key)));
}

/* As add_values: two keys at a time, 16 * parts columns, with weights in bf16. */
ALWAYS_INLINE void dot_values(const struct view *view, const int dtype, const int heads, const int parts,
                              const struct stretch *stretch, int column, const float *shrink,
                              float weights[][KEYS_AT_ONCE], float *out) {
    static const uint16_t low_half[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(low_half), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    int64_t first = stretch->first * view->width + column;
    int64_t upcoming = stretch->upcoming * view->width + column;
    __m512 sums[HEAD_STRIP][4];
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            sums[head][part] = (__m512)(load_lanes(out + head * view->width + part * LANES) * shrink[head]);
    for (int key = 0; key < stretch->count; key += 2, first += 2 * view->width, upcoming += 2 * view->width) {
        __m512bh pairs_of[4];
#pragma GCC unroll 2
        for (int part = 0; part < parts; part += 2) {
            __m512i one = thirty_two(view->values, dtype, first + part * LANES), other = _mm512_setzero_si512();
            if (key + 1 < stretch->count) other = thirty_two(view->values, dtype, first + view->width + part * LANES);
            fetch(view->values, dtype, upcoming + part * LANES);
            fetch(view->values, dtype, upcoming + view->width + part * LANES);
            pairs_of[part] = (__m512bh)_mm512_permutex2var_epi16(one, low, other);
            pairs_of[part + 1] = (__m512bh)_mm512_permutex2var_epi16(one, high, other);
        }
#pragma GCC unroll 6
        for (int head = 0; head < heads; head++) {
            int32_t two;
            memcpy(&two, (const uint16_t *)weights[head] + key, 4);
#pragma GCC unroll 4
            for (int part = 0; part < parts; part++)
                sums[head][part] = _mm512_dpbf16_ps(sums[head][part], pairs_of[part], (__m512bh)_mm512_set1_epi32(two));
        }
    }
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            store_lanes(out + head * view->width + part * LANES, (lanes)sums[head][part]);
}

#endif
