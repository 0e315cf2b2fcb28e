/* Attention of a chunk of a prompt by products of panels: 16 tokens with 64 keys at a time, in bf16 or
 * fp32, sums in fp32. */
#include "chunk.h"

struct view_of_tile {
    int64_t row, token, count, head;     /* of the sequence; its first token here; tokens; KV head */
    int64_t seen;                        /* slots that the first token sees end here */
    int group;
};

static void turn_queries(const struct chunk *chunk, struct desk *desk, const struct view_of_tile *tile,
                         const struct packed *queries) {
    const struct block *block = chunk->block;
    for (int head = 0; head < tile->group; head++) {
        for (int64_t i = 0; i < tile->count; i++) {
            int64_t token = tile->token + i;
            const float *query = chunk->projected + token * projected_of(block) +
                                 (tile->head * tile->group + head) * block->width;
            chunk->attention->rows->turn(query, block->query_norm, chunk->cosines + token * block->width,
                                    chunk->sines + token * block->width, block->width, block->epsilon, block->scale,
                                    desk->wide + i * block->width);
        }
        chunk->attention->pack(chunk->attention, desk->wide, FP32, block->width, tile->count, block->width, 1.0f, queries, head);
    }
}

/* desk->scores = queries times keys, as many columns at a time as a slab has. Moves the keys' addresses. */
static void score_keys(const struct chunk *chunk, struct desk *desk, const uint16_t **keys, int count,
                       const struct packed *queries, int64_t all) {
    int64_t most = slab_columns(chunk->attention), each = step_columns(chunk->attention);
    for (int64_t first = 0; first < chunk->block->width; first += most) {
        int64_t left = chunk->block->width - first, columns = left < most ? left : most;
        struct slab slab = {desk->bench.slabs[0].lines, 0, first / each, parts(columns, each)};
        chunk->attention->rows->lay_keys(keys, count, (int)columns, slab.lines);
        chunk->attention->multiply(chunk->attention, queries, 0, all, &slab, desk->scores, first > 0, 0);
        for (int i = 0; i < count; i++) keys[i] += most;
    }
}

/* Scores of KEYS keys from a slot on, weights of values, and the values added up. */
static void attend_keys(const struct chunk *chunk, struct desk *desk, const struct view_of_tile *tile,
                        const struct packed *queries, int64_t start, int count) {
    const struct block *block = chunk->block;
    const struct chunk_rows *rows = chunk->attention->rows;
    const uint16_t *keys[KEYS], *values[KEYS];
    int64_t all = (int64_t)tile->group * TILE, steps = KEYS / step_columns(chunk->attention);
    struct slab slab = {desk->bench.slabs[0].lines, 0, 0, 0};
    struct packed weights = {desk->weights, 0, 0, steps, 0};
    for (int i = 0; i < count; i++) {
        int64_t at = place_of_slot(chunk, tile->row, start + i, tile->head);
        keys[i] = (const uint16_t *)block->keys + at;
        values[i] = (const uint16_t *)block->values + at;
    }
    score_keys(chunk, desk, keys, count, queries, all);
    for (int64_t row = 0; row < all; row++) {
        int64_t last = tile->seen + row % TILE - start, first = block->window ? last - block->window : 0;
        last = last < 0 ? 0 : last < count ? last : count;
        first = first < 0 ? 0 : first < KEYS ? first : KEYS;
        float shrink = rows->weigh(desk->scores + row * PANEL, (int)first, (int)last, desk->largest + row,
                                   desk->total + row,
                                   desk->weights + row / TILE * steps * STEP_TILE + row % TILE * STEP_BYTES);
        for (int64_t part = 0; shrink != 1.0f && part < parts(block->width, PANEL); part++)
            rows->scale(desk->found + (part * all + row) * PANEL, shrink);
    }
    slab.steps = steps;
    for (int64_t part = 0; part < parts(block->width, PANEL); part++) {
        int columns = block->width - part * PANEL < PANEL ? (int)(block->width - part * PANEL) : PANEL;
        rows->lay_values(values, count, columns, slab.lines);
        for (int i = 0; i < count; i++) values[i] += PANEL;
        chunk->attention->multiply(chunk->attention, &weights, 0, all, &slab, desk->found + part * all * PANEL, 1, 0);
    }
}

void attend_chunk(const struct chunk *chunk, struct desk *desk, int64_t task) {
    const struct block *block = chunk->block;
    int64_t tiles = parts(chunk->rows->count, TILE), row = task / block->kv_heads / tiles;
    int64_t first_token = (tiles - 1 - task / block->kv_heads % tiles) * TILE; /* the longest first */
    struct view_of_tile tile = {row, row * chunk->rows->count + first_token, chunk->rows->count - first_token,
                                task % block->kv_heads,
                                chunk->rows->skips[row] + chunk->rows->lengths[row] + first_token + 1,
                                block->heads / block->kv_heads};
    tile.count = tile.count < TILE ? tile.count : TILE;
    int64_t all = (int64_t)tile.group * TILE, last = tile.seen + tile.count - 1, start = chunk->rows->skips[row];
    struct packed queries = {desk->queries, 0, 0, parts(block->width, step_columns(chunk->attention)), 0};
    if (block->window && tile.seen - block->window > start) start = tile.seen - block->window;
    turn_queries(chunk, desk, &tile, &queries);
    memset(desk->found, 0, (size_t)(parts(block->width, PANEL) * all * PANEL) * sizeof(float));
    for (int64_t i = 0; i < all; i++) desk->largest[i] = -3.0e38f, desk->total[i] = 0.0f;
    for (; start < last; start += KEYS)
        attend_keys(chunk, desk, &tile, &queries, start, last - start < KEYS ? (int)(last - start) : KEYS);
    for (int64_t i = 0; i < all; i++) {
        if (i % TILE >= tile.count) continue;
        float *out = chunk->context + (tile.token + i % TILE) * block->query.rows +
                     (tile.head * tile.group + i / TILE) * block->width;
        for (int64_t part = 0; part < parts(block->width, PANEL); part++) {
            int64_t columns = block->width - part * PANEL < PANEL ? block->width - part * PANEL : PANEL;
            chunk->attention->rows->scale(desk->found + (part * all + i) * PANEL, 1.0f / desk->total[i]);
            memcpy(out + part * PANEL, desk->found + (part * all + i) * PANEL, (size_t)columns * sizeof(float));
        }
    }
}

int64_t attention_tasks(const struct chunk *chunk) {
    return chunk->rows->rows * parts(chunk->rows->count, TILE) * chunk->block->kv_heads;
}
