/* Attention to bf16 keys and values with AVX-512 BF16: twice the products of fp32 an instruction, and nothing to widen.
 * Queries and weights are rounded to bf16, as torch's bf16 attention does; sums are fp32. */
#ifndef SPLITRUN_ATTEND_DOTS_H
#define SPLITRUN_ATTEND_DOTS_H

#include <immintrin.h>

#include "lanes.h"

#define PAIRS 32 /* columns of a register */

/* As score_strip, with the queries in bf16. */
ALWAYS_INLINE void dot_strip(const struct view *view, const int heads, const struct stretch *stretch, int start,
                             const uint16_t *query, lanes *quarters_of) {
    const uint16_t *keys = (const uint16_t *)view->keys + (stretch->first + start) * view->width;
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
            values[key] = (__m512bh)_mm512_loadu_si512(keys + (start + key < stretch->count ? key : 0) * view->width + i);
            fetch(view->keys, BF16, upcoming + key * view->width + i);
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
ALWAYS_INLINE void dot_values(const struct view *view, const int heads, const int parts, const struct stretch *stretch,
                              int column, const float *shrink, float weights[][KEYS_AT_ONCE], float *out) {
    static const uint16_t low_half[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(low_half), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const uint16_t *values = (const uint16_t *)view->values + stretch->first * view->width + column;
    int64_t upcoming = stretch->upcoming * view->width + column;
    __m512 sums[HEAD_STRIP][4];
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            sums[head][part] = (__m512)(load_lanes(out + head * view->width + part * LANES) * shrink[head]);
    for (int key = 0; key < stretch->count; key += 2, values += 2 * view->width, upcoming += 2 * view->width) {
        __m512bh pairs_of[4];
#pragma GCC unroll 2
        for (int part = 0; part < parts; part += 2) {
            __m512i one = _mm512_loadu_si512(values + part * LANES), other = _mm512_setzero_si512();
            if (key + 1 < stretch->count) other = _mm512_loadu_si512(values + view->width + part * LANES);
            fetch(view->values, BF16, upcoming + part * LANES);
            fetch(view->values, BF16, upcoming + view->width + part * LANES);
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
