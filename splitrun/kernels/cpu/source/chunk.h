/* A decoder layer for a chunk of a prompt: what chunk.c and chunkattention.c share. */
#ifndef SPLITRUN_CHUNK_H
#define SPLITRUN_CHUNK_H

#include "block.h"
#include "convert.h"
#include "panels.h"
#include "phases.h"

struct chunk {
    const struct many *many, *attention; /* the kernels of products with weights, and of those with keys and values */
    const struct block *block;
    const struct rows *rows;
    const uint16_t *in, *cosines, *sines;
    uint16_t *out;
    float *hidden, *projected, *context; /* Shape: (tokens, their width) */
    float *gated;                        /* where it is not packed at once */
    uint8_t *packed, *packed_gated, *benches;
    int64_t tokens, bench_bytes;
    struct portion products, gates; /* of a task; each gate has its up beside it */
    float unit;
    int threads;
    atomic_int arrived;
    struct phase *phases;
    struct run_of_tasks *runs; /* Shape: (phases, members) */
};

/* A worker's own memory. */
struct desk {
    struct workbench bench;
    float *wide;                /* Shape: (TILE, widest row) */
    uint8_t *queries, *weights; /* of attention: tiles of 16 tokens, one for each head */
    float *scores, *found;      /* Shape: (heads * TILE, PANEL); found: of each 64 columns of a head */
    float *largest, *total;     /* Shape: (heads * TILE,) */
};

ALWAYS_INLINE int64_t projected_of(const struct block *block) { return block->query.rows + 2 * block->key.rows; }

/* Where a slot of a row lies in keys and values. */
ALWAYS_INLINE int64_t place_of_slot(const struct chunk *chunk, int64_t row, int64_t slot, int64_t head) {
    const struct block *block = chunk->block;
    int64_t id = chunk->rows->tables[chunk->rows->table_starts[row] + slot / block->block_tokens];
    return ((id * block->kv_heads + head) * block->block_tokens + slot % block->block_tokens) * block->width;
}

/* chunkattention.c: 16 tokens of a row with the heads of a KV group. */
int64_t attention_tasks(const struct chunk *chunk);
void attend_chunk(const struct chunk *chunk, struct desk *desk, int64_t task);

#endif
