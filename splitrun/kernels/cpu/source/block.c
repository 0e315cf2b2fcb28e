/* The phases of a decoder layer for 1 to 16 tokens: norm, queries keys values, rotary, KV into the blocks, attention,
 * output, norm, gated SiLU, down; both residuals. Between the products everything stays in fp32; between layers it is
 * rounded to the dtype, wherever the layers are run. A token's bits depend on that token and its history alone. */
#include "chain.h"

#include "exponential.h"

#define MERGED 256       /* columns that a task merges; a multiple of GROUP */
#define FETCHED 4096     /* bytes of one matrix that come while another is read */
#define SEGMENT_KEYS 512 /* keys of a task: a long history is divided among threads, at places that never move */

static struct activations narrow(const struct run *run, int64_t columns) {
    struct activations x = run->narrow;
    x.group_stride = groups_of(columns);
    x.code_stride = x.value_stride = x.group_stride * GROUP;
    return x;
}

static void norm_token(const struct run *run, const struct block *block, int64_t token, const void *weight) {
    int64_t columns = block->query.columns;
    struct activations x = narrow(run, columns);
    float *normed = run->normed + token * columns;
    run->level->norm(run->hidden + token * columns, weight, block->dtype, columns, block->epsilon, normed);
    set_activations(run->level, block->query.format, &x, token, 0, normed, FP32, columns);
}

static void enter_layer(const struct run *run, const struct block *block, int layer, int64_t token) {
    int64_t columns = block->query.columns, start = token * columns, angles = token * block->rotary;
    if (layer == 0) {
        load_values(run->in, block->dtype, start, (int)columns, run->hidden + start);
        load_values(run->cosines, block->dtype, angles, block->rotary, run->cosine_values + angles);
        load_values(run->sines, block->dtype, angles, block->rotary, run->sine_values + angles);
    } else {
        store_values(run->hidden + start, block->dtype, 0, (int)columns, run->normed + start);
        load_values(run->normed + start, block->dtype, 0, (int)columns, run->hidden + start);
    }
    norm_token(run, block, token, block->first_norm);
}

/* A tile of a product into rows of a buffer. */
static void project_tile(const struct run *run, const struct block *block, const struct weight *weight, const void *bias,
                         int64_t tile, float *target) {
    struct activations x = narrow(run, weight->columns);
    float sums[MOST_ROWS * TILE];
    multiply_tile(run->level, weight, &x, run->tokens, tile, sums);
    for (int token = 0; token < run->tokens; token++)
        for (int64_t lane = 0; lane < lanes_of(weight, tile); lane++) {
            int64_t row = tile * TILE + lane;
            float value = sums[token * TILE + lane];
            if (bias) value = value + load_value(bias, block->dtype, row);
            target[token * projected_width(block) + row] = value;
        }
}

/* A tile of a product, added to the hidden rows. */
static void add_tile(const struct run *run, const struct block *block, const struct weight *weight, const void *bias,
                     const struct activations *x, int64_t tile) {
    float sums[MOST_ROWS * TILE];
    multiply_tile(run->level, weight, x, run->tokens, tile, sums);
    for (int token = 0; token < run->tokens; token++)
        for (int64_t lane = 0; lane < lanes_of(weight, tile); lane++) {
            int64_t row = tile * TILE + lane;
            float value = sums[token * TILE + lane];
            if (bias) value = value + load_value(bias, block->dtype, row);
            run->hidden[token * weight->rows + row] += value * block->residual;
        }
}

static void project(const struct run *run, const struct block *block, int64_t task) {
    const struct weight *weights[] = {&block->query, &block->key, &block->value};
    const void *biases[] = {block->query_bias, block->key_bias, block->value_bias};
    float *target = run->projected;
    for (int i = 0; i < 3; i++) {
        int64_t tasks = tiles_of(weights[i]);
        if (task < tasks) {
            project_tile(run, block, weights[i], biases[i], task, target);
            return;
        }
        task -= tasks;
        target += weights[i]->rows;
    }
}

static void rotate_head(const struct run *run, const struct block *block, int64_t token, float *head, const void *norm,
                        float scale) {
    if (norm) run->level->norm(head, norm, block->dtype, block->width, block->epsilon, head);
    run->level->rotate(head, run->cosine_values + token * block->rotary, run->sine_values + token * block->rotary,
                       block->rotary, scale);
    for (int i = block->rotary; i < block->width; i++) head[i] *= scale;
}

/* A head's new key or value into its slot. */
static void keep(const struct block *block, const float *values, int64_t slot, void *pool, float *scales) {
    if (block->kv_dtype != INT8_KV) {
        store_values(values, block->kv_dtype, slot * block->width, block->width, pool);
        return;
    }
    float largest = 0.0f, sum = 0.0f;
    int8_t *codes = (int8_t *)pool + slot * block->width;
    for (int i = 0; i < block->width; i++) {
        float magnitude = float_of(bits_of(values[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
        sum += magnitude * 0.0f; /* NaN when a value is not finite */
    }
    float inverse = largest > 1e-30f && sum == 0.0f ? 127.0f / largest : 0.0f;
    scales[slot] = largest * (1.0f / 127.0f) + sum;
    for (int i = 0; i < block->width; i++) {
        float value = inverse == 0.0f ? 0.0f : values[i] * inverse;
        codes[i] = (int8_t)((value + ROUNDING) - ROUNDING);
    }
}

static void rotate(const struct run *run, const struct block *block, const struct rows *rows, int64_t token) {
    int64_t row = token / rows->count, slot = rows->skips[row] + rows->lengths[row] + token % rows->count;
    int64_t id = rows->tables[rows->table_starts[row] + slot / block->block_tokens];
    float *query = run->projected + token * projected_width(block), *key = query + block->query.rows;
    for (int head = 0; head < block->heads; head++)
        rotate_head(run, block, token, query + head * block->width, block->query_norm, block->scale);
    for (int head = 0; head < block->kv_heads; head++) {
        float *own = key + head * block->width;
        int64_t place = (id * block->kv_heads + head) * block->block_tokens + slot % block->block_tokens;
        rotate_head(run, block, token, own, block->key_norm, 1.0f);
        keep(block, own, place, block->keys, block->key_scales);
        keep(block, own + block->key.rows, place, block->values, block->value_scales);
    }
}

/* Which slots a token looks at: [*first, *last). */
static void seen_slots(const struct block *block, const struct rows *rows, int64_t token, int64_t *first, int64_t *last) {
    int64_t row = token / rows->count;
    *last = rows->skips[row] + rows->lengths[row] + token % rows->count + 1;
    *first = rows->skips[row];
    if (block->window && *last - block->window > *first) *first = *last - block->window;
}

/* Segments that the longest row has; a window is one. */
static int64_t segments_of(const struct block *block, const struct rows *rows) {
    int64_t most = 0;
    for (int64_t row = 0; row < rows->rows; row++) {
        int64_t slots = rows->skips[row] + rows->lengths[row] + rows->count;
        most = slots > most ? slots : most;
    }
    return block->window ? 1 : (most + SEGMENT_KEYS - 1) / SEGMENT_KEYS;
}

/* Floats of the parts of the attention's result. */
int64_t partial_values(const struct block *block, const struct rows *rows) {
    return rows->rows * rows->count * segments_of(block, rows) * block->heads * (block->width + 2);
}

/* A KV head's part of the result for one segment: its heads' values, largest scores, and totals. */
static float *partial_of(const struct run *run, const struct block *block, int64_t place) {
    return run->partial + place * (block->heads / block->kv_heads) * (block->width + 2);
}

static void attend(const struct run *run, const struct block *block, const struct rows *rows, int64_t task) {
    int64_t segments = segments_of(block, rows), segment = task % segments, pair = task / segments, first, last;
    int64_t token = pair / block->kv_heads, head = pair % block->kv_heads, row = token / rows->count;
    int64_t slots = head * block->block_tokens, bytes[] = {4, 2, 2, 1};
    int group = block->heads / block->kv_heads;
    seen_slots(block, rows, token, &first, &last);
    int64_t end = last;
    if (segments > 1) {
        first = first > segment * SEGMENT_KEYS ? first : segment * SEGMENT_KEYS;
        last = last < (segment + 1) * SEGMENT_KEYS ? last : (segment + 1) * SEGMENT_KEYS;
        if (first >= last) return;
    }
    struct view view = {(const uint8_t *)block->keys + slots * block->width * bytes[block->kv_dtype],
                        (const uint8_t *)block->values + slots * block->width * bytes[block->kv_dtype],
                        block->key_scales ? block->key_scales + slots : 0,
                        block->value_scales ? block->value_scales + slots : 0,
                        block->block_tokens * block->kv_heads, rows->tables + rows->table_starts[row], first, last,
                        end, block->block_tokens, block->kv_dtype, block->width, group};
    float *out = partial_of(run, block, task), *largest = out + group * block->width;
    run->level->attend(&view, run->projected + token * projected_width(block) + head * group * block->width, out, largest,
                       largest + group);
}

/* Columns [start, stop) of one head's result from its segments. */
static void merge_head(const struct run *run, const struct block *block, const struct rows *rows, int64_t token,
                       int64_t head, int start, int stop, float *out) {
    int64_t segments = segments_of(block, rows), group = block->heads / block->kv_heads, first, last;
    int64_t place = (token * block->kv_heads + head / group) * segments, own = head % group;
    seen_slots(block, rows, token, &first, &last);
    int64_t from = segments > 1 ? first / SEGMENT_KEYS : 0, to = segments > 1 ? (last - 1) / SEGMENT_KEYS : 0;
    float largest = -3.0e38f, total = 0.0f;
    for (int64_t segment = from; segment <= to; segment++) {
        float other = partial_of(run, block, place + segment)[group * block->width + own];
        largest = other > largest ? other : largest;
    }
    for (int i = start; i < stop; i++) out[i - start] = 0.0f;
    for (int64_t segment = from; segment <= to; segment++) {
        const float *part = partial_of(run, block, place + segment), *numbers = part + group * block->width + own;
        float weight = exponential(numbers[0] - largest);
        total += numbers[group] * weight;
        for (int i = start; i < stop; i++) out[i - start] += part[own * block->width + i] * weight;
    }
    for (int i = start; i < stop; i++) out[i - start] /= total;
}

static int64_t merges_of(const struct block *block) { return (block->query.rows + MERGED - 1) / MERGED; }

static void merge(const struct run *run, const struct block *block, const struct rows *rows, int64_t task) {
    int64_t token = task / merges_of(block), start = task % merges_of(block) * MERGED, columns = block->query.rows;
    int64_t stop = start + MERGED < columns ? start + MERGED : columns;
    struct activations x = narrow(run, columns);
    float *context = run->context + token * columns;
    for (int64_t column = start; column < stop;) {
        int64_t head = column / block->width, end = (head + 1) * block->width;
        int64_t until = end < stop ? end : stop, first = head * block->width;
        merge_head(run, block, rows, token, head, (int)(column - first), (int)(until - first), context + column);
        column = until;
    }
    set_activations(run->level, block->output.format, &x, token, start, context + start, FP32, stop - start);
}

/* Let the beginning come of a task's weights, a fourth with each tile of what is read before. */
static void fetch_ahead(const struct weight *weight, int64_t task, int64_t fourth) {
    if (task * TILES >= tiles_of(weight)) return;
    const uint8_t *weights = weight->codes + task * TILES * TILE * row_bytes(weight) + fourth * (FETCHED / TILES);
    for (int byte = 0; byte < FETCHED / TILES; byte += LINE) __builtin_prefetch(weights + byte, 0, 2);
}

/* A group of the MLP's columns: gates and ups of as many rows, and what comes of them as activations. */
static void gate(const struct run *run, const struct block *block, int64_t task) {
    struct activations x = narrow(run, block->gate.columns);
    const struct weight *weights[] = {&block->gate, &block->up};
    int64_t first = task * GROUP, count = block->gate.rows - first < GROUP ? block->gate.rows - first : GROUP;
    float values[2][MOST_ROWS][GROUP], sums[MOST_ROWS * TILE];
    for (int i = 0; i < 2; i++)
        for (int64_t tile = task * TILES; tile < (task + 1) * TILES && tile < tiles_of(weights[i]); tile++) {
            fetch_ahead(weights[1 - i], task + i, tile - task * TILES);
            multiply_tile(run->level, weights[i], &x, run->tokens, tile, sums);
            for (int token = 0; token < run->tokens; token++)
                memcpy(values[i][token] + tile * TILE - first, sums + token * TILE,
                       sizeof(float) * (size_t)lanes_of(weights[i], tile));
        }
    for (int token = 0; token < run->tokens; token++) {
        run->level->gate(values[0][token], values[1][token], (int)count);
        set_activations(run->level, block->down.format, &run->wide, token, first, values[0][token], FP32, count);
    }
}

int64_t phase_tasks(const struct run *run, int layer, int phase) {
    const struct block *block = run->blocks[layer];
    int64_t tokens = run->tokens;
    switch (phase) {
        case PROJECT:
            return tiles_of(&block->query) + tiles_of(&block->key) + tiles_of(&block->value);
        case ATTEND: return tokens * block->kv_heads * segments_of(block, run->rows[layer]);
        case MERGE: return tokens * merges_of(block);
        case OUTPUT: return tiles_of(&block->output);
        case GATE: return tasks_of(tiles_of(&block->gate));
        case DOWN: return tiles_of(&block->down);
        default: return tokens;
    }
}

/* Where a task of a product starts to read, null for other phases. */
const uint8_t *task_weights(const struct block *block, int phase, int64_t task) {
    const struct weight *weight = phase == PROJECT  ? &block->query
                                  : phase == OUTPUT ? &block->output
                                  : phase == GATE   ? &block->gate
                                  : phase == DOWN   ? &block->down
                                                    : 0;
    int64_t tile = phase == GATE ? task * TILES : task;
    return !weight || tile >= tiles_of(weight) ? 0 : weight->codes + tile * TILE * row_bytes(weight);
}

void perform(const struct run *run, int layer, int phase, int64_t task) {
    const struct block *block = run->blocks[layer];
    const struct rows *rows = run->rows[layer];
    struct activations x = narrow(run, block->output.columns);
    switch (phase) {
        case NORM: enter_layer(run, block, layer, task); break;
        case PROJECT: project(run, block, task); break;
        case ROTATE: rotate(run, block, rows, task); break;
        case ATTEND: attend(run, block, rows, task); break;
        case MERGE: merge(run, block, rows, task); break;
        case OUTPUT: add_tile(run, block, &block->output, block->output_bias, &x, task); break;
        case SECOND_NORM: norm_token(run, block, task, block->second_norm); break;
        case GATE: gate(run, block, task); break;
        default: add_tile(run, block, &block->down, 0, &run->wide, task);
    }
}
