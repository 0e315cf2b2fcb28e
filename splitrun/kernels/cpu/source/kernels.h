/* The contract between the files of this library: storage layout, quantized activations, and what a level provides.
 *
 * Layout of a matrix (rows, columns): tiles of 16 rows; in a tile, "lines" of 64 bytes, four bytes for each of its rows.
 *   nf4   a line holds 8 columns: byte i of a row has column i in its low half, column 4 + i in its high half. Behind
 *         the eight lines of a group of 64 columns a ninth has its scales, fp32, one for each row: memory is read as one
 *         stream.
 *   int8  a line holds 4 columns. Scales: fp32, one for each row.
 * A last tile of fewer rows has shorter lines (4 bytes for each row that exists): no byte is padding.
 *   bf16, fp16  no lines: the plain matrix, row by row, without scales.
 *
 * Arithmetic is the same at every level, to the bit: integer sums over 64 columns, then fp32 products and sums in the
 * order of the groups, without fused multiply-add (the build says -ffp-contract=off); for 16-bit floats 16 partial sums
 * along a row. A row's result therefore depends neither on the level, nor on the threads, nor on the other rows. One
 * exception: avx512dots and amxdots multiply bf16 matrices with activations rounded to bf16, and attend to bf16 and int8
 * keys and values with queries and weights rounded so, in fp32 sums of their own; there too a row's bits depend on that
 * row alone.
 * Nothing here knows models or Python.
 */
#ifndef SPLITRUN_KERNELS_H
#define SPLITRUN_KERNELS_H

#include <stdint.h>

#define TILE 16          /* rows of a tile */
#define GROUP 64         /* columns that share an activation scale, and an nf4 scale */
#define LINE 64          /* bytes of a line of a full tile */
#define GROUP_LINES 9    /* of a group in nf4: the last has the scales */
#define MOST_ROWS 16     /* activation rows of one product */
#define LOOK_AHEAD 8192  /* bytes between what is read and what is prefetched */
#define NEXT_AHEAD 512   /* the same on x86, where matrices are read as one stream: to the first cache, */
#define FAR_AHEAD 3456   /* and to the second; a page of 4 KiB ahead, or more, is slower than none */
#define MOST_HEADS 64    /* query heads that share a KV head */
#define ROUNDING 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even */

#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#else
#define ALWAYS_INLINE static inline
#define EXPORT
#endif

enum format { NF4 = 0, INT8 = 1, BF16_ROWS = 2, FP16_ROWS = 3 };
enum dtype { FP32 = 0, BF16 = 1, FP16 = 2, INT8_KV = 3 }; /* the last for keys and values alone */

struct weight {
    uint8_t *codes;
    float *scales; /* of int8 alone */
    int64_t rows, columns;
    int32_t format;
};

/* Activations in int8: per row and group of 64 columns codes, one scale, and -128 times the sum of the codes; in fp32 for
 * products with 16-bit floats, or where the level has dots in bf16 for those with bf16. */
struct activations {
    int8_t *codes;
    float *scales;
    int32_t *offsets;
    int64_t code_stride, group_stride; /* between rows */
    float *values;
    int64_t value_stride;
};

/* Add to sums[row * TILE + lane] the product of a full tile's columns with each activation row. */
typedef void tile_product(const uint8_t *lines, int64_t columns, const struct activations *x, int rows, float *sums);
/* As tile_product for up to 16 rows of a plain matrix: sets sums. x: as activations have it; stride: in floats. */
typedef void dense_product(const void *weights, int dtype, int64_t columns, int matrix_rows, const float *x,
                           int64_t stride, int rows, float *sums);
/* Values of one matrix row: its codes in the first line, the stride to the next, and the scale of int8. */
typedef void row_values(const uint8_t *codes, int64_t stride, float scale, int64_t columns, int dtype, void *out);

/* One KV head's history of one token, seen from its query heads: keys first to last, in blocks that a table names. */
struct view {
    const void *keys, *values;              /* of this head in block 0. Shape: (block tokens, width) */
    const float *key_scales, *value_scales; /* of INT8_KV, of this head in block 0: one for each slot */
    int64_t block_stride;                   /* slots between a block and the next */
    const int64_t *table;
    int64_t first, last, end, block_tokens; /* [first, last) of a history that ends at end, in slots of the table */
    int32_t dtype, width, heads;
};

/* Per head: the largest score, the sum of exp(score - largest), and out[head * width ..], the values weighed with those.
 * Queries are scaled already. Shape of query and out: (heads, width). */
typedef void head_attention(const struct view *view, const float *query, float *out, float *largest, float *total);

/* vectors.h */
typedef void row_quantization(const void *x, int dtype, int64_t columns, float unit, int8_t *codes, float *scales,
                              int32_t *offsets);
typedef void row_norm(const float *values, const void *weight, int dtype, int64_t count, float epsilon, float *out);
typedef void row_rotation(float *head, const float *cosines, const float *sines, int width, float scale);
typedef void row_gate(float *gates, const float *ups, int count);

struct level {
    const char *name;
    tile_product *nf4_tile, *int8_tile;
    dense_product *dense_tile;
    row_values *nf4_row, *int8_row;
    head_attention *attend;
    row_quantization *quantize;
    row_norm *norm;
    row_rotation *rotate;
    row_gate *gate;
    int32_t dots; /* products with bf16 matrices take activations in bf16 */
};

/* A level of the functions that its file has defined. */
#define LEVEL(name)                                                                                                    \
    const struct level level_##name = {#name,  nf4_tile,     int8_tile, dense_tile, nf4_row, int8_row,                 \
                                       attend, quantize_row, norm_row,  rotate_row, gate_row, DENSE_DOTS}

extern const struct level level_amxdots, level_avx512dots, level_avx512vnni, level_avx2vnni, level_avx2, level_neon, level_portable;

extern const float nf4_table[16]; /* the format's values */
extern const int8_t nf4_codes[16]; /* the same times 127, rounded: what products use */

/* many.c: whether this process may use tile registers (AMX) for bf16. */
int has_tiles(void);

/* team.c */
void run_team(int threads, void (*work)(void *), void *argument);
int thread_number(void);

/* product.c */
void multiply_tile(const struct level *level, const struct weight *weight, const struct activations *x, int rows,
                   int64_t tile, float *sums);

#endif
