/* One decoder layer for 1 to 16 tokens in one call: norm, queries keys values, rotary, KV into the blocks, attention,
 * output, norm, gated SiLU, down; both residuals. Between the products everything stays in fp32.
 *
 * The layer is a list of phases, each a counter of tasks. Whoever is free takes the next task and goes on when all tasks
 * of the phase are done, so any number of threads, late ones too, gives the same result. A token's bits depend on that
 * token and its history alone. */
#include "block.h"
#include "convert.h"
#include "exponential.h"
#include "kernels.h"
#include "layout.h"
#include "phases.h"

#define TILES 4        /* of a task */
#define SEGMENT 1024   /* columns that a task quantizes; a multiple of GROUP */

enum { NORM, PROJECT, ROTATE, ATTEND, ROUND_CONTEXT, OUTPUT, SECOND_NORM, GATE, ROUND_GATED, DOWN, PHASES };

struct run {
    const struct level *level;
    const struct block *block;
    const struct rows *rows;
    const void *in, *cosines, *sines;
    void *out;
    float *hidden, *projected, *context, *gated; /* Shape: (tokens, their width) */
    int8_t *codes;
    float *scales;
    int32_t *offsets;
    int tokens;
    float unit;
    struct phase phases[PHASES];
};

static int64_t tiles_of(const struct weight *weight) { return (weight->rows + TILE - 1) / TILE; }
static int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }
static int64_t tasks_of(int64_t tiles) { return (tiles + TILES - 1) / TILES; }

static struct activations activations_of(const struct run *run, int64_t columns) {
    int64_t groups = groups_of(columns);
    struct activations x = {run->codes, run->scales, run->offsets, groups * GROUP, groups};
    return x;
}

/* Quantize columns [start, stop) of a token; start is a multiple of the group. */
static void round_columns(struct run *run, int64_t token, const float *values, int64_t columns, int64_t start,
                          int64_t stop) {
    int64_t groups = groups_of(columns), first = token * groups + start / GROUP;
    quantize_row(values + start, FP32, stop - start, run->unit, run->codes + first * GROUP, run->scales + first,
                 run->offsets + first);
}

static float inverse_root_mean_square(const float *values, int64_t count, float epsilon) {
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += values[i + lane] * values[i + lane];
    for (; i < count; i++) sums[0] += values[i] * values[i];
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    return 1.0f / __builtin_sqrtf(sums[0] / (float)count + epsilon);
}

static void norm_and_round(struct run *run, int64_t token, const void *weight) {
    int64_t columns = run->block->query.columns;
    const float *hidden = run->hidden + token * columns;
    float factor = inverse_root_mean_square(hidden, columns, run->block->epsilon);
    for (int64_t start = 0; start < columns; start += GROUP) {
        int count = columns - start < GROUP ? (int)(columns - start) : GROUP;
        float values[GROUP], weights[GROUP];
        int64_t first = token * groups_of(columns) + start / GROUP;
        load_values(weight, run->block->dtype, start, count, weights);
        for (int i = 0; i < count; i++) values[i] = hidden[start + i] * factor * weights[i];
        quantize_row(values, FP32, count, run->unit, run->codes + first * GROUP, run->scales + first,
                     run->offsets + first);
    }
}

/* Some tiles of a product into rows of a buffer, added to what is there or not. */
static void product_tiles(struct run *run, const struct weight *weight, const void *bias, int64_t task, float *target,
                          int64_t stride, int add) {
    struct activations x = activations_of(run, weight->columns);
    float sums[MOST_ROWS * TILE];
    for (int64_t tile = task * TILES; tile < (task + 1) * TILES && tile < tiles_of(weight); tile++) {
        multiply_tile(run->level, weight, &x, run->tokens, tile, sums);
        for (int token = 0; token < run->tokens; token++)
            for (int64_t lane = 0; lane < lanes_of(weight, tile); lane++) {
                int64_t row = tile * TILE + lane;
                float value = sums[token * TILE + lane];
                if (bias) value = value + load_value(bias, run->block->dtype, row);
                target[token * stride + row] = add ? target[token * stride + row] + value : value;
            }
    }
}

static int64_t projected_width(const struct block *block) {
    return block->query.rows + block->key.rows + block->value.rows;
}

static void project(struct run *run, int64_t task) {
    const struct block *block = run->block;
    const struct weight *weights[] = {&block->query, &block->key, &block->value};
    const void *biases[] = {block->query_bias, block->key_bias, block->value_bias};
    float *target = run->projected;
    for (int i = 0; i < 3; i++) {
        int64_t tasks = tasks_of(tiles_of(weights[i]));
        if (task < tasks) {
            product_tiles(run, weights[i], biases[i], task, target, projected_width(block), 0);
            return;
        }
        task -= tasks;
        target += weights[i]->rows;
    }
}

static void rotate_head(const struct run *run, int64_t token, float *head, const void *norm, float scale) {
    const struct block *block = run->block;
    int width = block->width, half = width / 2;
    float factor = norm ? inverse_root_mean_square(head, width, block->epsilon) : 1.0f;
    for (int i = 0; norm && i < width; i++) head[i] = head[i] * factor * load_value(norm, block->dtype, i);
    for (int i = 0; i < half; i++) {
        int64_t at = token * width + i;
        float low = head[i], high = head[i + half];
        head[i] = (low * load_value(run->cosines, block->dtype, at) - high * load_value(run->sines, block->dtype, at)) *
                  scale;
        head[i + half] = (high * load_value(run->cosines, block->dtype, at + half) +
                          low * load_value(run->sines, block->dtype, at + half)) *
                         scale;
    }
}

static void rotate(struct run *run, int64_t token) {
    const struct block *block = run->block;
    const struct rows *rows = run->rows;
    int64_t row = token / rows->count, slot = rows->skips[row] + rows->lengths[row] + token % rows->count;
    int64_t id = rows->tables[rows->table_starts[row] + slot / block->block_tokens];
    float *query = run->projected + token * projected_width(block), *key = query + block->query.rows;
    for (int head = 0; head < block->heads; head++)
        rotate_head(run, token, query + head * block->width, block->query_norm, block->scale);
    for (int head = 0; head < block->kv_heads; head++) {
        float *own = key + head * block->width;
        int64_t place = ((id * block->kv_heads + head) * block->block_tokens + slot % block->block_tokens) * block->width;
        rotate_head(run, token, own, block->key_norm, 1.0f);
        store_values(own, block->kv_dtype, place, block->width, block->keys);
        store_values(own + block->key.rows, block->kv_dtype, place, block->width, block->values);
    }
}

static void attend(struct run *run, int64_t task) {
    const struct block *block = run->block;
    const struct rows *rows = run->rows;
    int64_t token = task / block->kv_heads, head = task % block->kv_heads, row = token / rows->count;
    int64_t last = rows->skips[row] + rows->lengths[row] + token % rows->count + 1, first = rows->skips[row];
    int64_t per_head = block->block_tokens * block->width;
    int width = block->kv_dtype == FP32 ? 4 : 2, group = block->heads / block->kv_heads;
    if (block->window && last - block->window > first) first = last - block->window;
    struct view view = {(const uint8_t *)block->keys + head * per_head * width,
                        (const uint8_t *)block->values + head * per_head * width,
                        per_head * block->kv_heads, rows->tables + rows->table_starts[row], first, last,
                        block->block_tokens, block->kv_dtype, block->width, group};
    run->level->attend(&view, run->projected + token * projected_width(block) + head * group * block->width,
                       run->context + token * block->query.rows + head * group * block->width);
}

static void gate(struct run *run, int64_t task) {
    const struct block *block = run->block;
    struct activations x = activations_of(run, block->gate.columns);
    float gates[MOST_ROWS * TILE], ups[MOST_ROWS * TILE];
    for (int64_t tile = task * TILES; tile < (task + 1) * TILES && tile < tiles_of(&block->gate); tile++) {
        multiply_tile(run->level, &block->gate, &x, run->tokens, tile, gates);
        multiply_tile(run->level, &block->up, &x, run->tokens, tile, ups);
        for (int token = 0; token < run->tokens; token++)
            for (int64_t lane = 0; lane < lanes_of(&block->gate, tile); lane++) {
                float value = gates[token * TILE + lane];
                float active = value / (1.0f + exponential(-value));
                run->gated[token * block->gate.rows + tile * TILE + lane] = active * ups[token * TILE + lane];
            }
    }
}

static void perform(struct run *run, int phase, int64_t task) {
    const struct block *block = run->block;
    int64_t columns = block->query.columns, wide = block->gate.rows, segments = (wide + SEGMENT - 1) / SEGMENT;
    int64_t start = task % segments * SEGMENT, stop = start + SEGMENT < wide ? start + SEGMENT : wide;
    switch (phase) {
        case NORM:
            for (int64_t i = 0; i < columns; i++)
                run->hidden[task * columns + i] = load_value(run->in, block->dtype, task * columns + i);
            norm_and_round(run, task, block->first_norm);
            break;
        case PROJECT: project(run, task); break;
        case ROTATE: rotate(run, task); break;
        case ATTEND: attend(run, task); break;
        case ROUND_CONTEXT:
            round_columns(run, task, run->context + task * block->query.rows, block->query.rows, 0, block->query.rows);
            break;
        case OUTPUT: product_tiles(run, &block->output, block->output_bias, task, run->hidden, columns, 1); break;
        case SECOND_NORM: norm_and_round(run, task, block->second_norm); break;
        case GATE: gate(run, task); break;
        case ROUND_GATED:
            round_columns(run, task / segments, run->gated + task / segments * wide, wide, start, stop);
            break;
        default: product_tiles(run, &block->down, 0, task, run->hidden, columns, 1);
    }
}

static void work(void *argument) {
    struct run *run = argument;
    for (int index = 0; index < PHASES; index++) {
        struct phase *phase = &run->phases[index];
        int64_t task;
        while ((task = next_task(phase)) >= 0) {
            perform(run, index, task);
            task_done(phase);
        }
        wait_for(phase);
    }
}

static int64_t widest(const struct block *block) {
    int64_t most = block->query.columns > block->query.rows ? block->query.columns : block->query.rows;
    return most > block->gate.rows ? most : block->gate.rows;
}

/* Bytes of scratch memory that splitrun_block wants. */
EXPORT int64_t splitrun_block_scratch_bytes(const struct block *block, int64_t tokens) {
    int64_t floats = block->query.columns + projected_width(block) + block->query.rows + block->gate.rows;
    return tokens * (floats * 4 + groups_of(widest(block)) * (GROUP + 8));
}

/* Shape of in and out: (rows * count, hidden); of cosines and sines: (rows * count, width); all of the block's dtype. The
 * new keys and values are written to the blocks. */
EXPORT void splitrun_block(const struct level *level, const struct block *block, const struct rows *rows, const void *in,
                           const void *cosines, const void *sines, void *out, void *scratch, int32_t threads) {
    int64_t tokens = rows->rows * rows->count, groups = groups_of(widest(block));
    struct run run = {.level = level, .block = block, .rows = rows, .in = in, .cosines = cosines, .sines = sines};
    const int64_t tasks[PHASES] = {
        tokens,
        tasks_of(tiles_of(&block->query)) + tasks_of(tiles_of(&block->key)) + tasks_of(tiles_of(&block->value)),
        tokens,
        tokens * block->kv_heads,
        tokens,
        tasks_of(tiles_of(&block->output)),
        tokens,
        tasks_of(tiles_of(&block->gate)),
        tokens * ((block->gate.rows + SEGMENT - 1) / SEGMENT),
        tasks_of(tiles_of(&block->down)),
    };
    for (int phase = 0; phase < PHASES; phase++) run.phases[phase].tasks = tasks[phase];
    run.tokens = (int)tokens;
    run.unit = block->query.format == NF4 ? (1.0f / 127.0f) * (1.0f / 127.0f) : 1.0f / 127.0f;
    run.hidden = scratch;
    run.projected = run.hidden + tokens * block->query.columns;
    run.context = run.projected + tokens * projected_width(block);
    run.gated = run.context + tokens * block->query.rows;
    run.scales = run.gated + tokens * block->gate.rows;
    run.offsets = (int32_t *)(run.scales + tokens * groups);
    run.codes = (int8_t *)(run.offsets + tokens * groups);
    run_team(threads, work, &run);
    store_values(run.hidden, block->dtype, 0, (int)(tokens * block->query.columns), out);
}
