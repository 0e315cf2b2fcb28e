/* x86 with AVX-512 BW, VL, DQ and VNNI, and BF16 where the including file is compiled for it. Dot products of unsigned with signed bytes: weights are shifted by 128, and the
 * activations' offsets (-128 times their sum) take it back. */
#include <immintrin.h>

#include "x86_words.h"

#define HEAD_STRIP 6
#define DENSE_ROWS 4
#define OWN_WIDEN
#define widen(from) ((word_lanes)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from))))
#define widen_bytes(from) \
    ((lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from)))))

#define OWN_EXPAND
ALWAYS_INLINE void nf4_expand(const uint8_t *codes, int64_t stride, float scale, float *values) {
    const __m512 table = _mm512_loadu_ps(nf4_table), factor = _mm512_set1_ps(scale);
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int half = 0; half < 2; half++) {
        __m512i both = _mm512_cvtepu8_epi32(four_lines(codes + half * 4 * stride, stride));
        __m512 low = _mm512_mul_ps(_mm512_permutexvar_ps(both, table), factor); /* looks at the low four bits only */
        __m512 high = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table), factor);
        _mm512_storeu_ps(values + half * 32, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(values + half * 32 + 16, _mm512_permutex2var_ps(low, second, high));
    }
}

ALWAYS_INLINE void int8_expand(const uint8_t *codes, int64_t stride, float scale, float *values) {
    __m512 four = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(four_lines(codes, stride)));
    _mm512_storeu_ps(values, _mm512_mul_ps(four, _mm512_set1_ps(scale)));
}
#include "attend.h"
#include "dense.h"
#include "values.h"
#include "vectors.h"

ALWAYS_INLINE __m512i four_columns(const int8_t *codes) {
    return _mm512_set1_epi32(word_at(codes));
}

ALWAYS_INLINE __m512 add_group(__m512 sum, __m512i dots, __m512 scale) {
    return _mm512_add_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale));
}

/* Entries of the code book by the low four bits of each byte. A look-up in 64 bytes ignores two bits beyond, and the book
 * four times over makes it ignore all four. */
ALWAYS_INLINE __m512i look_up(__m512i book, __m512i bytes) {
#ifdef __AVX512VBMI__
    return _mm512_permutexvar_epi8(bytes, book);
#else
    return _mm512_shuffle_epi8(book, _mm512_and_si512(bytes, _mm512_set1_epi8(15)));
#endif
}

ALWAYS_INLINE void nf4_rows(const int rows, const uint8_t *lines, int64_t columns, const struct activations *x,
                            float *sums) {
    const __m512i shift = _mm512_set1_epi8((char)128);
    const __m512i signed_book = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)nf4_codes));
    const __m512i book = _mm512_xor_si512(signed_book, shift);
    __m512 totals[8];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) totals[row] = _mm512_loadu_ps(sums + row * TILE);
    for (int64_t group = 0; group < columns / GROUP; group++, lines += GROUP_LINES * LINE) {
        const int8_t *codes = x->codes + group * GROUP;
        __m512i even[8], odd[8];
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            even[row] = _mm512_set1_epi32(x->offsets[row * x->group_stride + group]);
            odd[row] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int line = 0; line < 8; line++) {
            fetch_both(lines + line * LINE);
            __m512i both = _mm512_loadu_si512(lines + line * LINE);
            __m512i low = look_up(book, both), high = look_up(book, _mm512_srli_epi16(both, 4));
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                const int8_t *eight = codes + row * x->code_stride + line * 8;
                __m512i *second = rows > 4 ? &even[row] : &odd[row]; /* few rows: two chains hide the latency */
                even[row] = _mm512_dpbusd_epi32(even[row], low, four_columns(eight));
                *second = _mm512_dpbusd_epi32(*second, high, four_columns(eight + 4));
            }
        }
        fetch_both(lines + 8 * LINE);
        __m512 scales = _mm512_loadu_ps(lines + 8 * LINE);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            __m512 scale = _mm512_set1_ps(x->scales[row * x->group_stride + group]);
            __m512i dots = rows > 4 ? even[row] : _mm512_add_epi32(even[row], odd[row]);
            totals[row] = add_group(totals[row], dots, _mm512_mul_ps(scales, scale));
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) _mm512_storeu_ps(sums + row * TILE, totals[row]);
}

ALWAYS_INLINE void int8_rows(const int rows, const uint8_t *lines, int64_t columns, const struct activations *x,
                             float *sums) {
    const __m512i shift = _mm512_set1_epi8((char)128);
    __m512 totals[8];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) totals[row] = _mm512_loadu_ps(sums + row * TILE);
    for (int64_t start = 0; start < columns; start += GROUP) {
        const int8_t *codes = x->codes + start;
        int count = columns - start < GROUP ? (int)(columns - start) / 4 : GROUP / 4;
        __m512i dots[8];
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            dots[row] = _mm512_set1_epi32(x->offsets[row * x->group_stride + start / GROUP]);
        for (int line = 0; line < count; line++, lines += LINE) {
            fetch_both(lines);
            __m512i four = _mm512_xor_si512(_mm512_loadu_si512(lines), shift);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
                dots[row] = _mm512_dpbusd_epi32(dots[row], four, four_columns(codes + row * x->code_stride + line * 4));
        }
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            totals[row] =
                add_group(totals[row], dots[row], _mm512_set1_ps(x->scales[row * x->group_stride + start / GROUP]));
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) _mm512_storeu_ps(sums + row * TILE, totals[row]);
}

#define MOST_AT_ONCE 8
#include "rows.h"
