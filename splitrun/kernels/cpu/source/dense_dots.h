/* Products with bf16 matrices by AVX-512 BF16: activations rounded to bf16, 32 products an instruction, fp32 sums. Lines
 * of a matrix row go to four partial sums in turn, which are added pairwise, then the lanes as ever: the same for any
 * number of rows. The instruction takes numbers below fp32's normal range as zeros. */
#ifndef SPLITRUN_DENSE_DOTS_H
#define SPLITRUN_DENSE_DOTS_H

#include <immintrin.h>

#include "lanes.h"
#include "x86_words.h"

#define DOTS 32 /* columns of a line */
#define CHAINS 4
#define DOT_ROWS 4 /* activation rows at a time, whose chains fit the registers */

ALWAYS_INLINE void add_line(const int rows, __m512i line, __mmask32 there, const uint16_t *x, int64_t stride,
                            __m512 sums[][CHAINS], const int chain) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
        __m512i part = there == 0xffffffff ? _mm512_loadu_si512(x + row * stride)
                                           : _mm512_maskz_loadu_epi16(there, x + row * stride);
        sums[row][chain] = _mm512_dpbf16_ps(sums[row][chain], (__m512bh)line, (__m512bh)part);
    }
}

/* sums[row * TILE] = partial sums of one matrix row with some activation rows. */
ALWAYS_INLINE void dot_row(const int rows, const uint16_t *weights, int64_t columns, const uint16_t *x, int64_t stride,
                           lanes *sums) {
    __m512 parts[DOT_ROWS][CHAINS];
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) parts[row][chain] = _mm512_setzero_ps();
    int64_t column = 0;
    for (; column + CHAINS * DOTS <= columns; column += CHAINS * DOTS)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) {
            int64_t at = column + chain * DOTS;
            fetch_both((const uint8_t *)(weights + at));
            add_line(rows, _mm512_loadu_si512(weights + at), 0xffffffff, x + at, stride, parts, chain);
        }
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; chain++, column += DOTS) {
        int64_t left = columns - column;
        if (left <= 0) break;
        __mmask32 there = left >= DOTS ? 0xffffffff : ((__mmask32)1 << left) - 1;
        add_line(rows, _mm512_maskz_loadu_epi16(there, weights + column), there, x + column, stride, parts, chain);
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
        sums[row * TILE] = (lanes)((parts[row][0] + parts[row][1]) + (parts[row][2] + parts[row][3]));
}

/* As dense_as, for activations in bf16; stride: of them, between rows. */
ALWAYS_INLINE void dense_dots(const uint16_t *weights, int64_t columns, int matrix_rows, const uint16_t *x, int64_t stride,
                              int rows, float *sums) {
    lanes partial[MOST_ROWS * TILE];
    for (int i = 0; i < rows * TILE; i++) partial[i] = (lanes){0};
    for (int i = 0; i < matrix_rows; i++, weights += columns)
        for (int row = 0; row < rows; row += DOT_ROWS) {
            const uint16_t *from = x + row * stride;
            lanes *to = partial + row * TILE + i;
            switch (rows - row) {
                case 1: dot_row(1, weights, columns, from, stride, to); break;
                case 2: dot_row(2, weights, columns, from, stride, to); break;
                case 3: dot_row(3, weights, columns, from, stride, to); break;
                default: dot_row(DOT_ROWS, weights, columns, from, stride, to);
            }
        }
    for (int row = 0; row < rows; row++) store_lanes(sums + row * TILE, sixteen_sums(partial + row * TILE));
}

#endif
