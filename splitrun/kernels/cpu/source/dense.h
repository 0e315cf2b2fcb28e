/* Products with 16-bit floating-point matrices as torch stores them, row by row: fp32 products and sums in 16 partial
 * sums along a row, without fused multiply-add, so the bits are the same at every level but where dots are used. */
#ifndef SPLITRUN_DENSE_H
#define SPLITRUN_DENSE_H

#include "lanes.h"
#ifdef __AVX512BF16__
#include "dense_dots.h"
#define DENSE_DOTS 1
#else
#define DENSE_DOTS 0
#endif

#define PAIR 2 /* matrix rows at a time: two chains of additions hide their latency */
#define STEP (2 * LANES) /* columns of a line */
#ifndef DENSE_ROWS /* activation rows at a time, as the level has registers */
#define DENSE_ROWS 2
#endif

ALWAYS_INLINE lanes some_lanes(const void *values, const int dtype, int64_t index, int count) {
    float padded[LANES] = {0};
    load_values(values, dtype, index, count, padded);
    return load_lanes(padded);
}

/* sums[row][..] = partial sums of `matrix_rows` matrix rows with `rows` activation rows; sums of a row are TILE apart.
 * Lines are fetched ahead one after the other, as they lie in memory: alternately along two rows takes twice as long. */
ALWAYS_INLINE void dense_strip(const int matrix_rows, const int rows, const uint16_t *weights, const int dtype,
                               int64_t columns, const float *x, int64_t stride, lanes *sums) {
    lanes strip[PAIR][DENSE_ROWS] = {{{0}}};
    int64_t column = 0;
    for (; column + STEP <= columns; column += STEP) {
#pragma GCC unroll 2
        for (int i = 0; i < matrix_rows; i++) __builtin_prefetch(weights + matrix_rows * column + i * STEP + LOOK_AHEAD / 2);
#pragma GCC unroll 4
        for (int at = 0; at < STEP; at += LANES) {
            lanes values[PAIR];
#pragma GCC unroll 2
            for (int i = 0; i < matrix_rows; i++) values[i] = load_as_lanes(weights, dtype, i * columns + column + at);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
                for (int i = 0; i < matrix_rows; i++)
                    strip[i][row] += values[i] * load_lanes(x + row * stride + column + at);
        }
    }
    for (; column < columns; column += LANES) {
        int left = columns - column < LANES ? (int)(columns - column) : LANES;
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < matrix_rows; i++)
                strip[i][row] += some_lanes(weights, dtype, i * columns + column, left) *
                                 some_lanes(x, FP32, row * stride + column, left);
    }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < matrix_rows; i++) sums[row * TILE + i] = strip[i][row];
}

/* The same for as many activation rows as the level takes at a time, or fewer. */
ALWAYS_INLINE void dense_rows(const int matrix_rows, int rows, const uint16_t *weights, const int dtype, int64_t columns,
                              const float *x, int64_t stride, lanes *sums) {
    switch (rows) {
        case 1: dense_strip(matrix_rows, 1, weights, dtype, columns, x, stride, sums); break;
        case 2: dense_strip(matrix_rows, 2, weights, dtype, columns, x, stride, sums); break;
#if DENSE_ROWS == 4
        case 3: dense_strip(matrix_rows, 3, weights, dtype, columns, x, stride, sums); break;
        default: dense_strip(matrix_rows, 4, weights, dtype, columns, x, stride, sums);
#endif
    }
}

ALWAYS_INLINE void dense_as(const uint16_t *weights, const int dtype, int64_t columns, int matrix_rows, const float *x,
                            int64_t stride, int rows, float *sums) {
    lanes partial[MOST_ROWS * TILE];
    for (int i = 0; i < rows * TILE; i++) partial[i] = (lanes){0};
    for (int first = 0; first < matrix_rows; first += PAIR)
        for (int row = 0; row < rows; row += DENSE_ROWS) {
            int at_once = rows - row < DENSE_ROWS ? rows - row : DENSE_ROWS;
            const uint16_t *strip = weights + first * columns;
            const float *from = x + row * stride;
            lanes *to = partial + row * TILE + first;
            if (first + PAIR <= matrix_rows)
                dense_rows(PAIR, at_once, strip, dtype, columns, from, stride, to);
            else
                dense_rows(1, at_once, strip, dtype, columns, from, stride, to);
        }
    for (int row = 0; row < rows; row++) store_lanes(sums + row * TILE, sixteen_sums(partial + row * TILE));
}

/* sums[row * TILE + lane] = the products of up to 16 matrix rows with each activation row. */
static void dense_tile(const void *weights, int dtype, int64_t columns, int matrix_rows, const float *x, int64_t stride,
                       int rows, float *sums) {
#ifdef __AVX512BF16__
    if (dtype == BF16)
        dense_dots(weights, columns, matrix_rows, (const uint16_t *)x, 2 * stride, rows, sums);
#else
    if (dtype == BF16)
        dense_as(weights, BF16, columns, matrix_rows, x, stride, rows, sums);
#endif
    else
        dense_as(weights, FP16, columns, matrix_rows, x, stride, rows, sums);
}

#endif
