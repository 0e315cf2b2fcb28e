/* One decoder layer for a chunk of a prompt in one call: what block.c computes, with products of many rows and attention by
 * products of panels. Between the products everything is fp32, except that attention may multiply bf16. bf16 only. */
#include "chunk.h"

enum { NORM, PROJECT, TURN_KEYS, ATTEND, PACK_CONTEXT, OUTPUT, SECOND_NORM, GATE, PACK_GATED, DOWN, STORE, PHASES };

static int64_t even(int64_t bytes) { return parts(bytes, 64) * 64; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t narrow_of(const struct block *block) { return larger(block->query.columns, block->query.rows); }

static struct desk desk_in(const struct block *block, uint8_t *memory, int64_t *bytes) {
    int64_t rows = (int64_t)(block->heads / block->kv_heads) * TILE;
    struct desk desk;
    uint8_t *next = memory + even(workbench_bytes());
    desk.bench = workbench_in(memory);
    desk.wide = (float *)next;
    desk.queries = next += even(TILE * larger(narrow_of(block), block->gate.rows) * 4);
    desk.weights = next += rows / TILE * parts(block->width, FEWEST_STEP_COLUMNS) * STEP_TILE;
    desk.scores = (float *)(next += rows / TILE * (KEYS / FEWEST_STEP_COLUMNS) * STEP_TILE);
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
        chunk->attention->rows->norm(chunk->hidden + (tile * TILE + row) * columns, weight, columns, block->epsilon,
                                desk->wide + row * columns);
    chunk->many->pack(chunk->many, desk->wide, FP32, columns, rows, columns, chunk->unit, &packed, tile);
}

static void pack_tile(const struct chunk *chunk, const float *values, int64_t columns, uint8_t *activations, int64_t tile) {
    struct packed packed = packed_in(chunk->many, chunk->tokens, columns, activations);
    chunk->many->pack(chunk->many, values + tile * TILE * columns, FP32, columns, tile_rows(chunk, tile), columns,
                      chunk->unit, &packed, tile);
}

static int64_t groups_of_panels(const struct weight *weight, const struct portion *portion) {
    return parts(weight_panels(weight), portion->panels);
}

/* The products of some panels with packed activations. */
static void multiply(const struct chunk *chunk, const struct desk *desk, const struct part *part, uint8_t *activations) {
    struct packed packed = packed_in(chunk->many, chunk->tokens, part->weight->columns, activations);
    multiply_part(chunk->many, part, &packed, &desk->bench);
}

static const float *bias_of(const void *bias, const struct weight *weight, int64_t panel, float *copy) {
    if (!bias) return 0;
    memset(copy, 0, PANEL * sizeof(float));
    load_values(bias, BF16, panel * PANEL, (int)panel_outputs(weight, panel), copy);
    return copy;
}

static int64_t projections(const struct chunk *chunk) {
    const struct block *block = chunk->block;
    return groups_of_panels(&block->query, &chunk->products) + groups_of_panels(&block->key, &chunk->products) +
           groups_of_panels(&block->value, &chunk->products);
}

static void project(const struct chunk *chunk, struct desk *desk, int64_t task) {
    const struct block *block = chunk->block;
    const struct weight *weights[] = {&block->query, &block->key, &block->value};
    const void *biases[] = {block->query_bias, block->key_bias, block->value_bias};
    float *target = chunk->projected, bias[PANEL], scales[PANEL];
    int64_t rows = task / projections(chunk), stride = projected_of(block), groups;
    int which = 0;
    task %= projections(chunk);
    for (; task >= (groups = groups_of_panels(weights[which], &chunk->products)); which++) {
        task -= groups;
        target += weights[which]->rows;
    }
    const struct weight *weight = weights[which];
    struct part part = part_of(weight, 0, &chunk->products, chunk->tokens, rows, task);
    multiply(chunk, desk, &part, chunk->packed);
    for (int64_t i = 0, panel = part.panel; i < part.panels; i++, panel++)
        chunk->many->store(desk->bench.sums + i * sums_of(part.rows), part.rows, panel_outputs(weight, panel),
                           panel_scales(chunk->many, weight, panel, scales), bias_of(biases[which], weight, panel, bias),
                           FP32, target, part.first_row * stride + panel * PANEL, stride);
}

static void add_product(const struct chunk *chunk, struct desk *desk, const struct weight *weight, const void *bias,
                        uint8_t *activations, int64_t task) {
    int64_t groups = groups_of_panels(weight, &chunk->products);
    struct part part = part_of(weight, 0, &chunk->products, chunk->tokens, task / groups, task % groups);
    float copy[PANEL], scales[PANEL];
    multiply(chunk, desk, &part, activations);
    for (int64_t i = 0, panel = part.panel; i < part.panels; i++, panel++)
        chunk->attention->rows->add(desk->bench.sums + i * sums_of(part.rows), part.rows, panel_outputs(weight, panel),
                               panel_scales(chunk->many, weight, panel, scales), bias_of(bias, weight, panel, copy),
                               chunk->hidden + part.first_row * weight->rows + panel * PANEL, weight->rows);
}

static void gate(const struct chunk *chunk, struct desk *desk, int64_t task) {
    const struct block *block = chunk->block;
    const struct chunk_rows *rows = chunk->attention->rows;
    int64_t groups = groups_of_panels(&block->gate, &chunk->gates), stride = block->gate.rows;
    struct part part = part_of(&block->gate, &block->up, &chunk->gates, chunk->tokens, task / groups, task % groups);
    int64_t each = sums_of(part.rows);
    float gate_scales[PANEL], up_scales[PANEL], *gates = desk->bench.sums, *ups = gates + part.panels * each;
    struct packed packed = packed_in(chunk->many, chunk->tokens, stride, chunk->packed_gated);
    multiply(chunk, desk, &part, chunk->packed);
    for (int64_t i = 0, panel = part.panel; i < part.panels; i++, panel++) {
        int64_t outputs = panel_outputs(&block->gate, panel);
        if (chunk->gated)
            rows->gate(gates + i * each, ups + i * each, part.rows, outputs,
                       panel_scales(chunk->many, &block->gate, panel, gate_scales),
                       panel_scales(chunk->many, &block->up, panel, up_scales),
                       chunk->gated + part.first_row * stride + panel * PANEL, stride);
        else
            rows->gate_packed(gates + i * each, ups + i * each, part.rows, outputs, &packed, part.first_row, panel);
    }
}

static void turn_keys(const struct chunk *chunk, struct desk *desk, int64_t tile) {
    const struct block *block = chunk->block;
    for (int64_t token = tile * TILE; token < tile * TILE + tile_rows(chunk, tile); token++) {
        int64_t row = token / chunk->rows->count;
        int64_t slot = chunk->rows->skips[row] + chunk->rows->lengths[row] + token % chunk->rows->count;
        const float *keys = chunk->projected + token * projected_of(block) + block->query.rows;
        for (int head = 0; head < block->kv_heads; head++, keys += block->width) {
            int64_t at = place_of_slot(chunk, row, slot, head);
            chunk->attention->rows->turn(keys, block->key_norm, chunk->cosines + token * block->width,
                                    chunk->sines + token * block->width, block->width, block->epsilon, 1.0f, desk->wide);
            store_values(desk->wide, BF16, 0, block->width, (uint16_t *)block->keys + at);
            store_values(keys + block->key.rows, BF16, 0, block->width, (uint16_t *)block->values + at);
        }
    }
}

static void perform(struct chunk *chunk, struct desk *desk, int phase, int64_t task) {
    const struct block *block = chunk->block;
    int64_t columns = block->query.columns, at = task * TILE * columns;
    switch (phase) {
        case NORM:
            chunk->attention->rows->widen(chunk->in + at, tile_rows(chunk, task) * columns, chunk->hidden + at);
            norm_tile(chunk, desk, task, block->first_norm);
            break;
        case PROJECT: project(chunk, desk, task); break;
        case TURN_KEYS: turn_keys(chunk, desk, task); break;
        case ATTEND: attend_chunk(chunk, desk, task); break;
        case PACK_CONTEXT: pack_tile(chunk, chunk->context, block->query.rows, chunk->packed, task); break;
        case OUTPUT: add_product(chunk, desk, &block->output, block->output_bias, chunk->packed, task); break;
        case SECOND_NORM: norm_tile(chunk, desk, task, block->second_norm); break;
        case GATE: gate(chunk, desk, task); break;
        case PACK_GATED: pack_tile(chunk, chunk->gated, block->gate.rows, chunk->packed_gated, task); break;
        case DOWN: add_product(chunk, desk, &block->down, 0, chunk->packed_gated, task); break;
        default: chunk->attention->rows->narrow(chunk->hidden + at, tile_rows(chunk, task) * columns, chunk->out + at);
    }
}

static void work(void *argument) {
    struct chunk *chunk = argument;
    struct seat seat = take_seat(&chunk->arrived, chunk->threads);
    int64_t bytes;
    struct desk desk = desk_in(chunk->block, chunk->benches + seat.bench * chunk->bench_bytes, &bytes);
    if (chunk->attention->enter) chunk->attention->enter();
    if (chunk->many->enter && !chunk->attention->enter) chunk->many->enter();
    for (int index = 0; index < PHASES; index++) {
        struct phase *phase = &chunk->phases[index];
        int64_t task;
        while ((task = next_task(phase, seat.member)) >= 0) {
            perform(chunk, &desk, index, task);
            task_done(phase);
        }
        wait_for(phase);
    }
    if (chunk->attention->leave) chunk->attention->leave();
}

/* Parts of scratch memory, each at a multiple of 64 bytes. */
static void *part_of_memory(uint8_t **memory, int64_t bytes) {
    void *start = *memory;
    *memory += even(bytes);
    return start;
}

/* Lay out a chunk's memory from an address on; returns how much it is. */
static int64_t lay_out(struct chunk *chunk, uint8_t *memory) {
    const struct block *block = chunk->block;
    int64_t tokens = chunk->tokens, gated = chunk->many->kind == BF16_PRODUCTS ? 0 : tokens * block->gate.rows * 4;
    uint8_t *start = memory;
    chunk->runs = part_of_memory(&memory, PHASES * members_of(chunk->threads) * (int64_t)sizeof(struct run_of_tasks));
    chunk->packed = part_of_memory(&memory, packed_bytes(chunk->many, tokens, narrow_of(block)));
    chunk->packed_gated = part_of_memory(&memory, packed_bytes(chunk->many, tokens, block->gate.rows));
    chunk->hidden = part_of_memory(&memory, tokens * block->query.columns * 4);
    chunk->projected = part_of_memory(&memory, tokens * projected_of(block) * 4);
    chunk->context = part_of_memory(&memory, tokens * block->query.rows * 4);
    chunk->gated = gated ? part_of_memory(&memory, gated) : 0;
    desk_in(block, memory, &chunk->bench_bytes);
    chunk->benches = part_of_memory(&memory, chunk->threads * chunk->bench_bytes);
    return memory - start;
}

/* Bytes of scratch memory that splitrun_chunk wants. */
EXPORT int64_t splitrun_chunk_scratch_bytes(const struct many *many, const struct block *block, int64_t tokens,
                                            int64_t threads) {
    struct chunk chunk = {.many = many, .block = block, .tokens = tokens, .threads = (int)threads};
    return lay_out(&chunk, (uint8_t *)(uintptr_t)many) + 64;
}

/* As splitrun_layers for one layer, for any number of tokens; all types bf16. many multiplies with weights, attention
 * (a kernel that has rows) with keys and values. */
EXPORT void splitrun_chunk(const struct many *many, const struct many *attention, const struct block *block,
                           const struct rows *rows, const void *in, const void *cosines, const void *sines, void *out,
                           void *scratch, int32_t threads) {
    int64_t tokens = rows->rows * rows->count, tiles = parts(tokens, TILE), most = panels_at_once(many);
    struct phase phases[PHASES];
    struct chunk chunk = {.many = many, .attention = attention, .block = block, .rows = rows, .in = in, .cosines = cosines,
                          .sines = sines, .out = out, .tokens = tokens, .unit = unit_of(many, &block->query),
                          .threads = threads, .phases = phases};
    lay_out(&chunk, (uint8_t *)even((int64_t)(uintptr_t)scratch));
    chunk.products = portion_of_task(many, tokens, weight_panels(&block->output), most, threads);
    chunk.gates = portion_of_task(many, tokens, weight_panels(&block->gate), most / 2, threads);
    const int64_t blocks = parts(tokens, chunk.products.rows), gates = parts(tokens, chunk.gates.rows);
    const int64_t tasks[PHASES] = {tiles, projections(&chunk) * blocks, tiles, attention_tasks(&chunk), tiles,
                                   groups_of_panels(&block->output, &chunk.products) * blocks, tiles,
                                   groups_of_panels(&block->gate, &chunk.gates) * gates, chunk.gated ? tiles : 0,
                                   groups_of_panels(&block->down, &chunk.products) * blocks, tiles};
    for (int phase = 0; phase < PHASES; phase++)
        open_phase(&phases[phase], tasks[phase], members_of(threads), chunk.runs + phase * members_of(threads));
    run_team(threads, work, &chunk);
}
