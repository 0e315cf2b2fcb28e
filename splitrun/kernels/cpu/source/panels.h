/* Products of many activation rows (prompts): the contract between the driver and the instruction sets.
 *
 * A panel is 64 outputs, four tiles of a weight. Its codes are expanded, a slab of columns at a time, to lines of 64 bytes:
 * 16 outputs x 2 columns in bf16, or 16 outputs x 4 columns in int8, in the order of the columns; then every activation
 * row is multiplied with it. Activations lie in tiles of 16 rows x 64 bytes, one for each step of 32 (bf16) or 64 (int8)
 * columns, with zeros for rows and columns that do not exist.
 *
 *   bf16  weights are the format's values rounded to bf16 once, activations bf16, sums fp32.
 *   fp32  the format's values and activations as they are, sums fp32, for processors without products in bf16: lines of
 *         16 outputs x 1 column, steps of 16 columns, and slabs of half as many.
 *   int8  a span of groups shares an activation scale and a weight scale; sums over a span are integers, then fp32
 *         products and sums run in the order of the spans. With a span of one group these are the bits of products.c; a
 *         wider span rounds nf4 codes again, to the largest scale of the span.
 *   int16 the same with codes of 16 bits and spans of one group: an error below that of bf16, and faster except
 *         on tiles. Lines and steps as in bf16.
 *
 * A row's result does not depend on the other rows, whatever their number. */
#ifndef SPLITRUN_PANELS_H
#define SPLITRUN_PANELS_H

#include "kernels.h"

#define PANEL 64                       /* outputs of a panel */
#define PANEL_TILES (PANEL / TILE)
#define STEP_BYTES 64                  /* of a row of activations */
#define STEP_TILE (TILE * STEP_BYTES)  /* bytes of 16 rows in a step */
#define SLAB 512                       /* columns that are expanded at a time, at most; a multiple of every span */
#define MOST_SPAN (SLAB / GROUP)       /* groups */
#define TILE_LINES (SLAB / 2 * LINE)   /* bytes from a tile of a slab to its next: each lies in one piece in the first cache */
#define SLAB_BYTES (PANEL_TILES * TILE_LINES)
#define ROWS_AT_ONCE 512               /* activation rows of a task, at most; half of them where they are not int8, */
#define PANELS_AT_ONCE 8               /* and panels: these rows of a slab stay in the second cache for all of them */
#define SUMS_AT_ONCE (ROWS_AT_ONCE * PANELS_AT_ONCE / 2 * PANEL) /* floats that a task keeps, at most */

#define WIDE_CODE 16383.0f /* the largest code of an activation in int16, */
#define WIDE_VALUE 1722.0f /* and of an nf4 value: sums over a group stay below 2^31, and the format's values are closest */

enum kind { BF16_PRODUCTS = 0, INT8_PRODUCTS = 1, INT16_PRODUCTS = 2, FP32_PRODUCTS = 3 };

/* Activations in tiles. Scales and offsets (-128 x the sum of the codes) are of integers only: per tile and span, 16. */
struct packed {
    uint8_t *tiles;
    float *scales;
    int32_t *offsets;
    int64_t steps, spans; /* of a row */
};

/* Some columns of a panel, expanded. Scales are of integers only: per span, 64. */
struct slab {
    uint8_t *lines; /* line i of tile t lies at t * TILE_LINES + i * LINE */
    float *scales;
    int64_t first, steps; /* columns, as steps of the activations */
};

/* Columns first to first + count of a panel that are to be expanded; count is at most slab_columns. ahead: from these codes to
 * those that follow them in time, in bytes; those may be fetched. */
struct expansion {
    const struct weight *weight;
    int64_t panel, first, count, ahead;
    struct slab slab;
};

#define KEYS 64             /* of an attention step */
#define MOST_CHUNK_WIDTH 512

/* What a prompt needs beside products: see chunk_rows.h. All 16-bit values are bf16; what is laid out or weighed is for
 * the products of the same kernel. */
struct chunk_rows {
    void (*norm)(const float *values, const uint16_t *weight, int64_t count, float epsilon, float *out);
    void (*turn)(const float *head, const uint16_t *norm, const uint16_t *cosines, const uint16_t *sines, int width,
                 float epsilon, float scale, float *out);
    void (*add)(float *sums, int64_t rows, int64_t count, const float *scales, const float *bias, float *target,
                int64_t stride);
    void (*gate)(float *gates, float *ups, int64_t rows, int64_t count, const float *gate_scales, const float *up_scales,
                 float *target, int64_t stride);
    /* As gate, to tiles of packed, in bf16; to whole tiles of rows. */
    void (*gate_packed)(const float *gates, const float *ups, int64_t rows, int64_t count, const struct packed *packed,
                        int64_t first_row, int64_t panel);
    float (*weigh)(const float *scores, int first, int last, float *largest, float *total, uint8_t *weights);
    void (*lay_keys)(const uint16_t *const *keys, int count, int width, uint8_t *lines);
    void (*lay_values)(const uint16_t *const *values, int count, int columns, uint8_t *lines);
    void (*scale)(float *values, float factor);
    void (*widen)(const uint16_t *values, int64_t count, float *out);
    void (*narrow)(const float *values, int64_t count, uint16_t *out);
};

struct many {
    const char *name;
    int kind;
    int span; /* groups that share a scale in int8 */
    /* Before and after a thread's calls of the others; may be null. */
    void (*enter)(void);
    void (*leave)(void);
    /* Up to 16 rows into a tile of packed. Shape of x: (rows, columns), stride values from row to row. */
    void (*pack)(const struct many *many, const void *x, int dtype, int64_t stride, int64_t rows, int64_t columns,
                 float unit, const struct packed *packed, int64_t tile);
    void (*expand)(const struct many *many, const struct expansion *expansion);
    /* sums[row * PANEL + output] = or += the products of some rows, from a tile on. Rows that fill a tile are computed,
     * and stored, too. Meanwhile, or then, expand what is next, if that is not null. */
    void (*multiply)(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                     const struct slab *slab, float *sums, int add, const struct expansion *next);
    /* Sums of a panel, times scales, plus bias (fp32 and PANEL long, or null), to outputs 0 to count of each row. */
    void (*store)(float *sums, int64_t rows, int64_t count, const float *scales, const float *bias, int dtype, void *out,
                  int64_t first, int64_t stride);
    /* Multiply and add registers, nothing else; returns the operations of one round. What benchmarks divide by. */
    int64_t (*spin)(int64_t rounds);
    const struct chunk_rows *rows; /* not of integers */
};

extern const struct many many_amx_bf16, many_amx_int8, many_avx512bf16, many_avx512int8, many_avx512int8_wide,
    many_avx512int16, many_avx2vnniint16, many_avx2int16, many_avx2fp32;

extern const int16_t nf4_wide_codes[16]; /* the format's values times WIDE_VALUE, rounded */

#define FEWEST_STEP_COLUMNS 16

ALWAYS_INLINE int64_t step_columns(const struct many *many) {
    return many->kind == INT8_PRODUCTS ? 64 : many->kind == FP32_PRODUCTS ? FEWEST_STEP_COLUMNS : 32;
}

ALWAYS_INLINE int64_t slab_columns(const struct many *many) { return many->kind == FP32_PRODUCTS ? SLAB / 2 : SLAB; }

ALWAYS_INLINE int has_scales(const struct many *many) {
    return many->kind == INT8_PRODUCTS || many->kind == INT16_PRODUCTS;
}

ALWAYS_INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

ALWAYS_INLINE int64_t weight_panels(const struct weight *weight) { return parts(weight->rows, PANEL); }

/* A thread's own memory for panels: a slab that is multiplied and one that is expanded, and the sums. */
struct workbench {
    struct slab slabs[2];
    float *sums; /* of several panels, each as long as sums_of says */
};

/* What a task multiplies at most: rows of activations, and panels. */
struct portion {
    int64_t rows, panels;
};

/* What a task multiplies: rows from the first of a tile on, with panels of a weight and as many of another of its shape. */
struct part {
    const struct weight *weight, *other; /* other may be null */
    int64_t panel, panels, first_row, rows;
};

/* Floats between the sums of a panel and those of the next. Shape of each: (rows to a whole tile, PANEL) */
ALWAYS_INLINE int64_t sums_of(int64_t rows) { return parts(rows, TILE) * TILE * PANEL; }

/* Panels of a task whose sums fit, at most. */
ALWAYS_INLINE int64_t panels_at_once(const struct many *many) {
    return many->kind == INT8_PRODUCTS ? PANELS_AT_ONCE / 2 : PANELS_AT_ONCE;
}

/* panels.c */
int64_t packed_bytes(const struct many *many, int64_t rows, int64_t columns);
struct packed packed_in(const struct many *many, int64_t rows, int64_t columns, uint8_t *memory);
int64_t workbench_bytes(void);
struct workbench workbench_in(uint8_t *memory);
void multiply_part(const struct many *many, const struct part *part, const struct packed *packed,
                   const struct workbench *bench);
int64_t panel_outputs(const struct weight *weight, int64_t panel);
const float *panel_scales(const struct many *many, const struct weight *weight, int64_t panel, float *copy);
struct portion portion_of_task(const struct many *many, int64_t rows, int64_t panels, int64_t most_panels, int64_t threads);
struct part part_of(const struct weight *weight, const struct weight *other, const struct portion *portion, int64_t rows,
                    int64_t block, int64_t group);
float unit_of(const struct many *many, const struct weight *weight);

#endif
