/* A run of layers one after the other, for few tokens: what block.c and chain.c share. */
#ifndef SPLITRUN_CHAIN_H
#define SPLITRUN_CHAIN_H

#include "activations.h"
#include "block.h"
#include "layout.h"

enum { NORM, PROJECT, ROTATE, ATTEND, MERGE, OUTPUT, SECOND_NORM, GATE, DOWN, PHASES };

/* Layers in a row, with the memory that they use one after the other. Shape of the floats: (tokens, their width). */
struct run {
    const struct level *level;
    const struct block *const *blocks;
    const struct rows *const *rows;
    const void *in, *cosines, *sines;
    int tokens, layers;
    float *cosine_values, *sine_values, *hidden, *normed, *projected, *context, *partial;
    struct activations narrow, wide; /* of the hidden width and of attention's; of the MLP's */
};

/* block.c */
int64_t phase_tasks(const struct run *run, int layer, int phase);
void perform(const struct run *run, int layer, int phase, int64_t task);
const uint8_t *task_weights(const struct block *block, int phase, int64_t task);
int64_t partial_values(const struct block *block, const struct rows *rows);

ALWAYS_INLINE int64_t projected_width(const struct block *block) {
    return block->query.rows + block->key.rows + block->value.rows;
}

#endif
