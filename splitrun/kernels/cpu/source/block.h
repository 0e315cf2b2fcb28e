/* A decoder layer as Python describes it, and the rows of a call: shared by the kernels for few and for many tokens. */
#ifndef SPLITRUN_BLOCK_H
#define SPLITRUN_BLOCK_H

#include "kernels.h"

struct block {
    struct weight query, key, value, output, gate, up, down;
    const void *query_bias, *key_bias, *value_bias, *output_bias; /* or null; of the dtype, as all vectors */
    const void *first_norm, *second_norm, *query_norm, *key_norm; /* the last two may be null */
    void *keys, *values;               /* Shape: (blocks, KV heads, block tokens, width) */
    float *key_scales, *value_scales;  /* of INT8_KV. Shape: (blocks, KV heads, block tokens) */
    int64_t block_tokens, window;      /* window 0: none */
    int32_t heads, kv_heads, width, rotary, dtype, kv_dtype;
    float epsilon, scale, residual;    /* what a branch is multiplied with before it is added */
};

/* Rows of equal new length: per row a table of blocks, its history's first slot in them, and the history's length. */
struct rows {
    const int64_t *tables, *table_starts, *skips, *lengths;
    int64_t rows, count;
};

#endif
