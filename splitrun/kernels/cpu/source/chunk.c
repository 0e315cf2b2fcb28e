/* One decoder layer for a chunk of a prompt in one call: what block.c computes, with products of many rows and attention by
 * products of panels. Between the products everything is fp32, except that attention multiplies bf16. bf16 only. */
#include "block.h"
#include "convert.h"
#include "panels.h"
#include "phases.h"

enum { NORM, PROJECT, TURN_KEYS, ATTEND, PACK_CONTEXT, OUTPUT, SECOND_NORM, GATE, PACK_GATED, DOWN, STORE, PHASES };

struct chunk {
    const struct many *many, *bf16; /* the products', and attention's */
    const struct block *block;
    const struct rows *rows;
    const uint16_t *in, *cosines, *sines;
    uint16_t *out;
    float *hidden, *projected, *context, *gated; /* Shape: (tokens, their width) */
    uint8_t *packed, *benches;
    int64_t tokens, bench_bytes;
    struct portion products, gates; /* of a task; each gate has its up beside it */
    float unit;
    atomic_int workers;
    struct phase phases[PHASES];
};

/* A worker's own memory. */
struct desk {
    struct workbench bench;
    float *wide;              /* Shape: (TILE, widest row) */
    uint8_t *queries, *weights; /* of attention: tiles of 16 tokens, one for each head */
    float *scores, *found;    /* Shape: (heads * TILE, PANEL); found: of each 64 columns of a head */
    float *largest, *total;   /* Shape: (heads * TILE,) */
};

static int64_t even(int64_t bytes) { return parts(bytes, 64) * 64; }

static int64_t widest_of(const struct block *block) {
    int64_t most = block->query.columns > block->query.rows ? block->query.columns : block->query.rows;
    return most > block->gate.rows ? most : block->gate.rows;
}

static int64_t projected_of(const struct block *block) { return block->query.rows + 2 * block->key.rows; }

static struct desk desk_in(const struct block *block, uint8_t *memory, int64_t *bytes) {
    int64_t rows = (int64_t)(block->heads / block->kv_heads) * TILE;
    struct desk desk;
    uint8_t *next = memory + even(workbench_bytes());
    desk.bench = workbench_in(memory);
    desk.wide = (float *)next;
    desk.queries = next += even(TILE * widest_of(block) * 4);
    desk.weights = next += rows / TILE * parts(block->width, 32) * STEP_TILE;
    desk.scores = (float *)(next += rows / TILE * (KEYS / 32) * STEP_TILE);
    desk.found = (float *)(next += rows * PANEL * 4);
    desk.largest = (float *)(next += parts(block->width, PANEL) * rows * PANEL * 4);
    desk.total = desk.largest + rows;
    *bytes = next + even(rows * 8) - memory;
    return desk;
}

static int64_t tile_rows(const struct chunk *chunk, int64_t tile) {
    int64_t left = chunk->tokens - tile * TILE;
    return left < TILE ? left : TILE;
}

static void norm_tile(const struct chunk *chunk, struct desk *desk, int64_t tile, const void *weight) {
    const struct block *block = chunk->block;
    int64_t columns = block->query.columns, rows = tile_rows(chunk, tile);
    struct packed packed = packed_in(chunk->many, chunk->tokens, columns, chunk->packed);
    for (int64_t row = 0; row < rows; row++)
        chunk->bf16->rows->norm(chunk->hidden + (tile * TILE + row) * columns, weight, columns, block->epsilon,
                                desk->wide + row * columns);
    chunk->many->pack(chunk->many, desk->wide, FP32, columns, rows, columns, chunk->unit, &packed, tile);
}

static void pack_tile(const struct chunk *chunk, const float *values, int64_t columns, int64_t tile) {
    struct packed packed = packed_in(chunk->many, chunk->tokens, columns, chunk->packed);
    chunk->many->pack(chunk->many, values + tile * TILE * columns, FP32, columns, tile_rows(chunk, tile), columns,
                      chunk->unit, &packed, tile);
}

/* Panels of a weight, and rows of activations. */
struct part {
    int64_t panel, panels, first, rows;
};

static int64_t groups_of_panels(const struct weight *weight, const struct portion *portion) {
    return parts(weight_panels(weight), portion->panels);
}

static struct part part_of(const struct chunk *chunk, const struct weight *weight, const struct portion *portion,
                           int64_t task) {
    int64_t blocks = parts(chunk->tokens, portion->rows), panel = task / blocks * portion->panels;
    int64_t first = task % blocks * portion->rows, panels = weight_panels(weight) - panel, rows = chunk->tokens - first;
    struct part part = {panel, panels < portion->panels ? panels : portion->panels, first,
                        rows < portion->rows ? rows : portion->rows};
    return part;
}

static void multiply_part(const struct chunk *chunk, const struct desk *desk, const struct weight *weight,
                          const struct part *part, float *sums) {
    struct packed packed = packed_in(chunk->many, chunk->tokens, weight->columns, chunk->packed);
    multiply_panels(chunk->many, weight, part->panel, part->panels, &packed, part->first, part->rows, &desk->bench, sums);
}

static const float *bias_of(const void *bias, const struct weight *weight, int64_t panel, float *copy) {
    if (!bias) return 0;
    memset(copy, 0, PANEL * sizeof(float));
    load_values(bias, BF16, panel * PANEL, (int)panel_outputs(weight, panel), copy);
    return copy;
}

static void project(const struct chunk *chunk, struct desk *desk, int64_t task) {
    const struct block *block = chunk->block;
    const struct weight *weights[] = {&block->query, &block->key, &block->value};
    const void *biases[] = {block->query_bias, block->key_bias, block->value_bias};
    float *target = chunk->projected, bias[PANEL], scales[PANEL];
    int64_t blocks = parts(chunk->tokens, chunk->products.rows), stride = projected_of(block), tasks;
    int which = 0;
    for (; task >= (tasks = groups_of_panels(weights[which], &chunk->products) * blocks); which++) {
        task -= tasks;
        target += weights[which]->rows;
    }
    const struct weight *weight = weights[which];
    struct part part = part_of(chunk, weight, &chunk->products, task);
    multiply_part(chunk, desk, weight, &part, desk->bench.sums);
    for (int64_t i = 0, panel = part.panel; i < part.panels; i++, panel++)
        chunk->many->store(desk->bench.sums + i * sums_of(part.rows), part.rows, panel_outputs(weight, panel),
                           panel_scales(chunk->many, weight, panel, scales), bias_of(biases[which], weight, panel, bias),
                           FP32, target, part.first * stride + panel * PANEL, stride);
}

static void add_product(const struct chunk *chunk, struct desk *desk, const struct weight *weight, const void *bias,
                        int64_t task) {
    struct part part = part_of(chunk, weight, &chunk->products, task);
    float copy[PANEL], scales[PANEL];
    multiply_part(chunk, desk, weight, &part, desk->bench.sums);
    for (int64_t i = 0, panel = part.panel; i < part.panels; i++, panel++)
        chunk->bf16->rows->add(desk->bench.sums + i * sums_of(part.rows), part.rows, panel_outputs(weight, panel),
                               panel_scales(chunk->many, weight, panel, scales), bias_of(bias, weight, panel, copy),
                               chunk->hidden + part.first * weight->rows + panel * PANEL, weight->rows);
}

static void gate(const struct chunk *chunk, struct desk *desk, int64_t task) {
    const struct block *block = chunk->block;
    struct part part = part_of(chunk, &block->gate, &chunk->gates, task);
    int64_t each = sums_of(part.rows), stride = block->gate.rows;
    float gate_scales[PANEL], up_scales[PANEL], *gates = desk->bench.sums, *ups = gates + part.panels * each;
    multiply_part(chunk, desk, &block->gate, &part, gates);
    multiply_part(chunk, desk, &block->up, &part, ups);
    for (int64_t i = 0, panel = part.panel; i < part.panels; i++, panel++)
        chunk->bf16->rows->gate(gates + i * each, ups + i * each, part.rows, panel_outputs(&block->gate, panel),
                                panel_scales(chunk->many, &block->gate, panel, gate_scales),
                                panel_scales(chunk->many, &block->up, panel, up_scales),
                                chunk->gated + part.first * stride + panel * PANEL, stride);
}

/* Where a slot of a row lies in keys and values. */
static int64_t place(const struct chunk *chunk, int64_t row, int64_t slot, int64_t head) {
    const struct block *block = chunk->block;
    int64_t id = chunk->rows->tables[chunk->rows->table_starts[row] + slot / block->block_tokens];
    return ((id * block->kv_heads + head) * block->block_tokens + slot % block->block_tokens) * block->width;
}

static void turn_keys(const struct chunk *chunk, struct desk *desk, int64_t tile) {
    const struct block *block = chunk->block;
    for (int64_t token = tile * TILE; token < tile * TILE + tile_rows(chunk, tile); token++) {
        int64_t row = token / chunk->rows->count;
        int64_t slot = chunk->rows->skips[row] + chunk->rows->lengths[row] + token % chunk->rows->count;
        const float *keys = chunk->projected + token * projected_of(block) + block->query.rows;
        for (int head = 0; head < block->kv_heads; head++, keys += block->width) {
            int64_t at = place(chunk, row, slot, head);
            chunk->bf16->rows->turn(keys, block->key_norm, chunk->cosines + token * block->width,
                                    chunk->sines + token * block->width, block->width, block->epsilon, 1.0f, desk->wide);
            store_values(desk->wide, BF16, 0, block->width, (uint16_t *)block->keys + at);
            store_values(keys + block->key.rows, BF16, 0, block->width, (uint16_t *)block->values + at);
        }
    }
}

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
            chunk->bf16->rows->turn(query, block->query_norm, chunk->cosines + token * block->width,
                                    chunk->sines + token * block->width, block->width, block->epsilon, block->scale,
                                    desk->wide + i * block->width);
        }
        chunk->bf16->pack(chunk->bf16, desk->wide, FP32, block->width, tile->count, block->width, 1.0f, queries, head);
    }
}

/* Scores of KEYS keys from a slot on, weights of values, and the values added up. */
static void attend_keys(const struct chunk *chunk, struct desk *desk, const struct view_of_tile *tile,
                        const struct packed *queries, int64_t start, int count) {
    const struct block *block = chunk->block;
    const struct chunk_rows *rows = chunk->bf16->rows;
    const uint16_t *keys[KEYS], *values[KEYS];
    int64_t all = (int64_t)tile->group * TILE;
    struct slab slab = {desk->bench.slab.lines, 0, 0, queries->steps};
    struct packed weights = {desk->weights, 0, 0, KEYS / 32, 0};
    for (int i = 0; i < count; i++) {
        int64_t at = place(chunk, tile->row, start + i, tile->head);
        keys[i] = (const uint16_t *)block->keys + at;
        values[i] = (const uint16_t *)block->values + at;
    }
    rows->lay_keys(keys, count, block->width, slab.lines);
    chunk->bf16->multiply(chunk->bf16, queries, 0, all, &slab, desk->scores, 0);
    for (int64_t row = 0; row < all; row++) {
        uint16_t weighed[KEYS];
        int64_t last = tile->seen + row % TILE - start, first = block->window ? last - block->window : 0;
        last = last < 0 ? 0 : last < count ? last : count;
        first = first < 0 ? 0 : first < KEYS ? first : KEYS;
        float shrink = rows->weigh(desk->scores + row * PANEL, (int)first, (int)last, desk->largest + row,
                                   desk->total + row, weighed);
        for (int step = 0; step < KEYS / 32; step++)
            memcpy(desk->weights + (row / TILE * (KEYS / 32) + step) * STEP_TILE + row % TILE * STEP_BYTES,
                   weighed + step * 32, STEP_BYTES);
        for (int64_t part = 0; shrink != 1.0f && part < parts(block->width, PANEL); part++)
            rows->scale(desk->found + (part * all + row) * PANEL, shrink);
    }
    slab.steps = KEYS / 32;
    for (int64_t part = 0; part < parts(block->width, PANEL); part++) {
        int columns = block->width - part * PANEL < PANEL ? (int)(block->width - part * PANEL) : PANEL;
        rows->lay_values(values, count, columns, slab.lines);
        for (int i = 0; i < count; i++) values[i] += PANEL;
        chunk->bf16->multiply(chunk->bf16, &weights, 0, all, &slab, desk->found + part * all * PANEL, 1);
    }
}

static void attend(const struct chunk *chunk, struct desk *desk, int64_t task) {
    const struct block *block = chunk->block;
    int64_t tiles = parts(chunk->rows->count, TILE), row = task / block->kv_heads / tiles;
    int64_t first_token = (tiles - 1 - task / block->kv_heads % tiles) * TILE; /* the longest first */
    struct view_of_tile tile = {row, row * chunk->rows->count + first_token, chunk->rows->count - first_token,
                                task % block->kv_heads,
                                chunk->rows->skips[row] + chunk->rows->lengths[row] + first_token + 1,
                                block->heads / block->kv_heads};
    tile.count = tile.count < TILE ? tile.count : TILE;
    int64_t all = (int64_t)tile.group * TILE, last = tile.seen + tile.count - 1, start = chunk->rows->skips[row];
    struct packed queries = {desk->queries, 0, 0, parts(block->width, 32), 0};
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
            chunk->bf16->rows->scale(desk->found + (part * all + i) * PANEL, 1.0f / desk->total[i]);
            memcpy(out + part * PANEL, desk->found + (part * all + i) * PANEL, (size_t)columns * sizeof(float));
        }
    }
}

static void perform(const struct chunk *chunk, struct desk *desk, int phase, int64_t task) {
    const struct block *block = chunk->block;
    int64_t columns = block->query.columns, at = task * TILE * columns;
    switch (phase) {
        case NORM:
            load_values(chunk->in, BF16, at, (int)(tile_rows(chunk, task) * columns), chunk->hidden + at);
            norm_tile(chunk, desk, task, block->first_norm);
            break;
        case PROJECT: project(chunk, desk, task); break;
        case TURN_KEYS: turn_keys(chunk, desk, task); break;
        case ATTEND: attend(chunk, desk, task); break;
        case PACK_CONTEXT: pack_tile(chunk, chunk->context, block->query.rows, task); break;
        case OUTPUT: add_product(chunk, desk, &block->output, block->output_bias, task); break;
        case SECOND_NORM: norm_tile(chunk, desk, task, block->second_norm); break;
        case GATE: gate(chunk, desk, task); break;
        case PACK_GATED: pack_tile(chunk, chunk->gated, block->gate.rows, task); break;
        case DOWN: add_product(chunk, desk, &block->down, 0, task); break;
        default:
            store_values(chunk->hidden + at, BF16, 0, (int)(tile_rows(chunk, task) * columns), chunk->out + at);
    }
}

static void work(void *argument) {
    struct chunk *chunk = argument;
    int64_t bytes, worker = atomic_fetch_add(&chunk->workers, 1);
    struct desk desk = desk_in(chunk->block, chunk->benches + worker * chunk->bench_bytes, &bytes);
    if (chunk->bf16->enter) chunk->bf16->enter();
    if (chunk->many->enter && !chunk->bf16->enter) chunk->many->enter();
    for (int index = 0; index < PHASES; index++) {
        struct phase *phase = &chunk->phases[index];
        int64_t task;
        while ((task = next_task(phase)) >= 0) {
            perform(chunk, &desk, index, task);
            task_done(phase);
        }
        wait_for(phase);
    }
    if (chunk->bf16->leave) chunk->bf16->leave();
}

/* Bytes of scratch memory that splitrun_chunk wants. */
EXPORT int64_t splitrun_chunk_scratch_bytes(const struct many *many, const struct block *block, int64_t tokens,
                                            int64_t threads) {
    int64_t floats = block->query.columns + projected_of(block) + block->query.rows + block->gate.rows, bytes;
    desk_in(block, (uint8_t *)(uintptr_t)many, &bytes);
    return even(tokens * floats * 4) + even(packed_bytes(many, tokens, widest_of(block))) + threads * bytes + 64;
}

/* As splitrun_block, for any number of tokens; all types bf16. many multiplies weights, bf16 is of that kind. */
EXPORT void splitrun_chunk(const struct many *many, const struct many *bf16, const struct block *block,
                           const struct rows *rows, const void *in, const void *cosines, const void *sines, void *out,
                           void *scratch, int32_t threads) {
    int64_t tokens = rows->rows * rows->count, tiles = parts(tokens, TILE);
    struct chunk chunk = {.many = many, .bf16 = bf16, .block = block, .rows = rows, .in = in, .cosines = cosines,
                          .sines = sines, .out = out, .tokens = tokens, .unit = unit_of(&block->query)};
    chunk.products = portion_of_task(tokens, weight_panels(&block->output), PANELS_AT_ONCE, threads);
    chunk.gates = portion_of_task(tokens, weight_panels(&block->gate), PANELS_AT_ONCE / 2, threads);
    const int64_t blocks = parts(tokens, chunk.products.rows), gates = parts(tokens, chunk.gates.rows);
    const int64_t projected = groups_of_panels(&block->query, &chunk.products) +
                              groups_of_panels(&block->key, &chunk.products) +
                              groups_of_panels(&block->value, &chunk.products);
    const int64_t tasks[PHASES] = {tiles, projected * blocks, tiles,
                                   rows->rows * parts(rows->count, TILE) * block->kv_heads, tiles,
                                   groups_of_panels(&block->output, &chunk.products) * blocks, tiles,
                                   groups_of_panels(&block->gate, &chunk.gates) * gates, tiles,
                                   groups_of_panels(&block->down, &chunk.products) * blocks, tiles};
    for (int phase = 0; phase < PHASES; phase++) chunk.phases[phase].tasks = tasks[phase];
    chunk.packed = (uint8_t *)even((int64_t)(uintptr_t)scratch);
    chunk.hidden = (float *)(chunk.packed + even(packed_bytes(many, tokens, widest_of(block))));
    chunk.projected = chunk.hidden + tokens * block->query.columns;
    chunk.context = chunk.projected + tokens * projected_of(block);
    chunk.gated = chunk.context + tokens * block->query.rows;
    chunk.benches = (uint8_t *)even((int64_t)(uintptr_t)(chunk.gated + tokens * block->gate.rows));
    desk_in(block, chunk.benches, &chunk.bench_bytes);
    run_team(threads, work, &chunk);
}
