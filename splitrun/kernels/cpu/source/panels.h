/* Products of many activation rows (prompts): the contract between the driver and the instruction sets.
 *
 * A panel is 64 outputs, four tiles of a weight. Its codes are expanded, a slab of columns at a time, to lines of 64 bytes:
 * 16 outputs x 2 columns in bf16, or 16 outputs x 4 columns in int8, in the order of the columns; then every activation
 * row is multiplied with it. Activations lie in tiles of 16 rows x 64 bytes, one for each step of 32 (bf16) or 64 (int8)
 * columns, with zeros for rows and columns that do not exist.
 *
 *   bf16  weights are the format's values rounded to bf16 once, activations bf16, sums fp32.
 *   int8  a span of groups shares an activation scale and a weight scale; sums over a span are integers, then fp32
 *         products and sums run in the order of the spans. With a span of one group these are the bits of products.c; a
 *         wider span rounds nf4 codes again, to the largest scale of the span.
 *
 * A row's result does not depend on the other rows, whatever their number. */
#ifndef SPLITRUN_PANELS_H
#define SPLITRUN_PANELS_H

#include "kernels.h"

#define PANEL 64                       /* outputs of a panel */
#define PANEL_TILES (PANEL / TILE)
#define STEP_BYTES 64                  /* of a row of activations */
#define STEP_TILE (TILE * STEP_BYTES)  /* bytes of 16 rows in a step */
#define SLAB 512                       /* columns that are expanded at a time; a multiple of every span */
#define MOST_SPAN (SLAB / GROUP)       /* groups */
#define ROW (PANEL_TILES * LINE)       /* bytes from a line of a tile to its next: the four tiles alternate */
#define SLAB_BYTES (SLAB / 2 * ROW)    /* of the lines of a slab, at most */
#define ROWS_AT_ONCE 512               /* activation rows that a task keeps sums for, at most, */
#define PANELS_AT_ONCE 4               /* and panels: these rows of a slab stay in the second cache for all of them */

enum kind { BF16_PRODUCTS = 0, INT8_PRODUCTS = 1 };

/* Activations in tiles. Scales and offsets (-128 x the sum of the codes) are of int8 only: per tile and span, 16. */
struct packed {
    uint8_t *tiles;
    float *scales;
    int32_t *offsets;
    int64_t steps, spans; /* of a row */
};

/* Some columns of a panel, expanded. Scales are of int8 only: per span, 64. */
struct slab {
    uint8_t *lines; /* line i of tile t lies at i * ROW + t * LINE */
    float *scales;
    int64_t first, steps; /* columns, as steps of the activations */
};

#define KEYS 64             /* of an attention step */
#define MOST_CHUNK_WIDTH 512

/* What a prompt needs beside products: see chunk_rows.h. All 16-bit values are bf16. */
struct chunk_rows {
    void (*norm)(const float *values, const uint16_t *weight, int64_t count, float epsilon, float *out);
    void (*turn)(const float *head, const uint16_t *norm, const uint16_t *cosines, const uint16_t *sines, int width,
                 float epsilon, float scale, float *out);
    void (*add)(float *sums, int64_t rows, int64_t count, const float *scales, const float *bias, float *target,
                int64_t stride);
    void (*gate)(float *gates, float *ups, int64_t rows, int64_t count, const float *gate_scales, const float *up_scales,
                 float *target, int64_t stride);
    float (*weigh)(float *scores, int first, int last, float *largest, float *total, uint16_t *weights);
    void (*lay_keys)(const uint16_t *const *keys, int count, int width, uint8_t *lines);
    void (*lay_values)(const uint16_t *const *values, int count, int columns, uint8_t *lines);
    void (*scale)(float *values, float factor);
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
    /* Columns first to first + count of a panel; count is at most SLAB. */
    void (*expand)(const struct many *many, const struct weight *weight, int64_t panel, int64_t first, int64_t count,
                   const struct slab *slab);
    /* sums[row * PANEL + output] = or += the products of some rows, from a tile on. Rows that fill a tile are computed,
     * and stored, too. */
    void (*multiply)(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                     const struct slab *slab, float *sums, int add);
    /* Sums of a panel, times scales, plus bias (fp32 and PANEL long, or null), to outputs 0 to count of each row. */
    void (*store)(float *sums, int64_t rows, int64_t count, const float *scales, const float *bias, int dtype, void *out,
                  int64_t first, int64_t stride);
    /* Multiply and add registers, nothing else; returns the operations of one round. What benchmarks divide by. */
    int64_t (*spin)(int64_t rounds);
    const struct chunk_rows *rows; /* of bf16 only */
};

extern const struct many many_amx_bf16, many_amx_int8, many_avx512bf16, many_avx512int8, many_avx512int8_wide;

ALWAYS_INLINE int64_t step_columns(const struct many *many) { return many->kind == BF16_PRODUCTS ? 32 : 64; }

ALWAYS_INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

ALWAYS_INLINE int64_t weight_panels(const struct weight *weight) { return parts(weight->rows, PANEL); }

/* A thread's own memory for panels: a slab and the sums. */
struct workbench {
    struct slab slab;
    float *sums; /* of several panels, each as long as sums_of says */
};

/* What a task multiplies at most: rows of activations, and panels. */
struct portion {
    int64_t rows, panels;
};

/* Floats between the sums of a panel and those of the next. Shape of each: (rows to a whole tile, PANEL) */
ALWAYS_INLINE int64_t sums_of(int64_t rows) { return parts(rows, TILE) * TILE * PANEL; }

/* panels.c */
int64_t packed_bytes(const struct many *many, int64_t rows, int64_t columns);
struct packed packed_in(const struct many *many, int64_t rows, int64_t columns, uint8_t *memory);
int64_t workbench_bytes(void);
struct workbench workbench_in(uint8_t *memory);
void multiply_panels(const struct many *many, const struct weight *weight, int64_t panel, int64_t panels,
                     const struct packed *packed, int64_t first_row, int64_t rows, const struct workbench *bench,
                     float *sums);
int64_t panel_outputs(const struct weight *weight, int64_t panel);
const float *panel_scales(const struct many *many, const struct weight *weight, int64_t panel, float *copy);
struct portion portion_of_task(int64_t rows, int64_t panels, int64_t most_panels, int64_t threads);
float unit_of(const struct weight *weight);

#endif
