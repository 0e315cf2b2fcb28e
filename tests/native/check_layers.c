/* Decoder layers of every level against portable C, in memory that a sanitizer watches: attention over blocks of every kind
 * of keys and values, histories that end anywhere, rows that see infinities and NaN, on teams that come late or are smaller
 * than asked for. Also norms and plain reads. Prints the levels; status 1 with a line on the first fault.
 *
 * With TEAMS_ONLY it does little else than work in teams, for a sanitizer that looks at threads. */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "block.h"

const struct level *splitrun_level(int32_t index);
void splitrun_use_openmp(void *, void *);
void splitrun_quantize(const struct weight *, int64_t, int64_t, const void *, int32_t, int32_t);
int64_t splitrun_layers_scratch_bytes(const struct block *const *, const struct rows *const *, int32_t, int32_t);
void splitrun_layers(const struct level *, const struct block *const *, const struct rows *const *, int32_t,
                     const void *, const void *, const void *, void *, void *, int32_t);
void splitrun_norm(const struct level *, const void *, const void *, int32_t, int64_t, int64_t, float, void *, float *);
uint64_t splitrun_read(const uint64_t *, int64_t, int32_t);

enum { LAYERS = 2, BLOCKS = 40, ROWS = 2, MOST_SLOTS = 640, MOST_THREADS = 7 };

static uint32_t state = 1;

static uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)(state >> 8) * below >> 24);
}

static float noise(void) { return (float)draw(1 << 24) / 8388608.0f - 1.0f; }

static void *array(int64_t bytes) {
    void *memory = malloc(bytes ? (size_t)bytes : 1);
    if (!memory) exit(2);
    return memory;
}

static void fault(const char *level, const char *what) {
    printf("%s: %s\n", level, what);
    exit(1);
}

static int64_t bytes_of(int dtype) { return dtype == FP32 ? 4 : dtype == INT8_KV ? 1 : 2; }

static void *random_values(int64_t count, int dtype, float size) {
    void *values = array(count * bytes_of(dtype));
    for (int64_t i = 0; i < count; i++) {
        float value = noise() * size;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype == FP32) ((float *)values)[i] = value;
        if (dtype == BF16) ((uint16_t *)values)[i] = (uint16_t)(bits >> 16);
        if (dtype == FP16) ((uint16_t *)values)[i] = (uint16_t)((bits & 0x80000000) >> 16 | 0x3000 | (bits >> 13 & 0x3ff));
        if (dtype == INT8_KV) ((int8_t *)values)[i] = (int8_t)(noise() * 127.0f);
    }
    return values;
}

/* A team of threads in the place of OpenMP's: fewer than asked for, and in an order of their own. */
struct member {
    void (*work)(void *);
    void *argument;
    int number, pauses;
};

static _Thread_local int own_number;
static int granted = 1;

static int number_in_team(void) { return own_number; }

static void *run_member(void *argument) {
    struct member *member = argument;
    own_number = member->number;
    for (int i = 0; i < member->pauses; i++) sched_yield();
    member->work(member->argument);
    return 0;
}

static void parallel(void (*work)(void *), void *argument, unsigned threads, unsigned flags) {
    pthread_t handles[MOST_THREADS];
    struct member members[MOST_THREADS];
    int count = (int)threads < granted ? (int)threads : granted;
    (void)flags;
    for (int i = 0; i < count; i++) {
        members[i] = (struct member){work, argument, i, (int)draw(300)};
        if (i && pthread_create(&handles[i], 0, run_member, &members[i])) exit(2);
    }
    run_member(&members[0]);
    for (int i = 1; i < count; i++) pthread_join(handles[i], 0);
    own_number = 0;
}

struct shape {
    int format, dtype, kv_dtype, hidden, inner, heads, kv_heads, width, rotary, window, extras;
    int64_t slots; /* of a block */
};

static struct weight random_weight(const struct shape *shape, int64_t rows, int64_t columns) {
    int64_t row_bytes = shape->format == NF4 ? columns / GROUP * GROUP_LINES * 4 : columns * (shape->format == INT8 ? 1 : 2);
    void *values = random_values(rows * columns, shape->dtype, 0.3f);
    struct weight weight = {array(rows * row_bytes), shape->format == INT8 ? array(rows * 4) : 0, rows, columns, shape->format};
    if (shape->format == NF4 || shape->format == INT8)
        splitrun_quantize(&weight, 0, rows, values, shape->dtype, 1);
    else
        memcpy(weight.codes, values, (size_t)(rows * row_bytes));
    free(values);
    return weight;
}

/* Everything that a layer points to. */
struct layer {
    struct block block;
    void *vectors[8];
};

static struct layer random_layer(const struct shape *shape) {
    int64_t query = shape->heads * shape->width, key = shape->kv_heads * shape->width, kv = BLOCKS * key * shape->slots;
    int64_t lengths[] = {query, key, key, shape->hidden, shape->hidden, shape->hidden, shape->width, shape->width};
    struct layer layer = {{.query = random_weight(shape, query, shape->hidden), .key = random_weight(shape, key, shape->hidden),
                           .value = random_weight(shape, key, shape->hidden), .output = random_weight(shape, shape->hidden, query),
                           .gate = random_weight(shape, shape->inner, shape->hidden),
                           .up = random_weight(shape, shape->inner, shape->hidden),
                           .down = random_weight(shape, shape->hidden, shape->inner)}, {0}};
    struct block *block = &layer.block;
    const void **places[] = {&block->query_bias, &block->key_bias, &block->value_bias, &block->output_bias,
                             &block->first_norm, &block->second_norm, &block->query_norm, &block->key_norm};
    for (int i = 0; i < 8; i++)
        if (shape->extras || i == 4 || i == 5) *places[i] = layer.vectors[i] = random_values(lengths[i], shape->dtype, 1.0f);
    block->keys = random_values(kv, shape->kv_dtype, 1.0f);
    block->values = random_values(kv, shape->kv_dtype, 1.0f);
    if (shape->kv_dtype == INT8_KV) {
        block->key_scales = random_values(kv / shape->width, FP32, 0.01f);
        block->value_scales = random_values(kv / shape->width, FP32, 0.01f);
    }
    block->block_tokens = shape->slots, block->window = shape->window;
    block->heads = shape->heads, block->kv_heads = shape->kv_heads, block->width = shape->width;
    block->rotary = shape->rotary, block->dtype = shape->dtype, block->kv_dtype = shape->kv_dtype;
    block->epsilon = 1e-6f, block->scale = 0.07f, block->residual = shape->extras ? 0.7f : 1.0f;
    return layer;
}

static void free_layer(struct layer *layer) {
    struct weight *weights[] = {&layer->block.query, &layer->block.key, &layer->block.value, &layer->block.output,
                                &layer->block.gate, &layer->block.up, &layer->block.down};
    for (int i = 0; i < 7; i++) free(weights[i]->codes), free(weights[i]->scales);
    for (int i = 0; i < 8; i++) free(layer->vectors[i]);
    free(layer->block.keys), free(layer->block.values), free(layer->block.key_scales), free(layer->block.value_scales);
}

/* A call: rows of so many new tokens, and what comes out. */
struct call {
    const struct shape *shape;
    const struct layer *layers; /* as they were before: each run has keys and values of its own */
    struct rows rows;
    const void *in, *cosines, *sines;
};

static void *copy_of(const void *memory, int64_t bytes) { return memory ? memcpy(array(bytes), memory, (size_t)bytes) : 0; }

static void *run(const struct call *call, const struct level *level, int threads) {
    const struct shape *shape = call->shape;
    int64_t kv = (int64_t)BLOCKS * shape->kv_heads * shape->width * shape->slots, tokens = call->rows.rows * call->rows.count;
    int64_t scales = kv / shape->width * 4;
    struct block own[LAYERS];
    const struct block *blocks[LAYERS];
    const struct rows *rows[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        const struct block *before = &call->layers[i].block;
        own[i] = *before, blocks[i] = &own[i], rows[i] = &call->rows;
        own[i].keys = copy_of(before->keys, kv * bytes_of(shape->kv_dtype));
        own[i].values = copy_of(before->values, kv * bytes_of(shape->kv_dtype));
        own[i].key_scales = copy_of(before->key_scales, scales);
        own[i].value_scales = copy_of(before->value_scales, scales);
    }
    int64_t bytes = splitrun_layers_scratch_bytes(blocks, rows, LAYERS, threads);
    void *scratch = aligned_alloc(64, (size_t)bytes), *out = array(tokens * shape->hidden * bytes_of(shape->dtype));
    memset(scratch, 0xff, (size_t)bytes); /* NaN, wherever it is read before it is written */
    splitrun_layers(level, blocks, rows, LAYERS, call->in, call->cosines, call->sines, out, scratch, threads);
    for (int i = 0; i < LAYERS; i++) free(own[i].keys), free(own[i].values), free(own[i].key_scales), free(own[i].value_scales);
    free(scratch);
    return out;
}

static double value_at(const void *values, int dtype, int64_t index) {
    uint16_t half = dtype == FP32 ? 0 : ((const uint16_t *)values)[index];
    uint32_t bits = (uint32_t)half << 16;
    float value;
    if (dtype == FP32) return ((const float *)values)[index];
    if (dtype == FP16) {
        int exponent = half >> 10 & 31, fraction = half & 0x3ff;
        double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
        return exponent == 31 ? (double)NAN : half & 0x8000 ? -size : size;
    }
    memcpy(&value, &bits, 4);
    return value;
}

static void compare(const struct call *call, const void *found, const void *wanted, int exact, const char *level,
                    const char *what) {
    int64_t count = call->rows.rows * call->rows.count * call->shape->hidden;
    double error = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        double a = value_at(found, call->shape->dtype, i), b = value_at(wanted, call->shape->dtype, i);
        if (isfinite(a) != isfinite(b) || (exact && isfinite(a) && a != b)) fault(level, what);
        if (isfinite(a)) error += (a - b) * (a - b), norm += b * b;
    }
    if (error > 0.02 * 0.02 * norm) fault(level, what);
}

/* Whether a level's sums of these types have an order of their own. */
static int rounds(const struct level *level, const struct shape *shape) {
    return level->dots && (shape->format == BF16_ROWS || shape->kv_dtype == BF16 || shape->kv_dtype == INT8_KV);
}

/* One call at every level and with several teams; the second row alone must come out as it did beside the first. */
static void check_call(const struct call *call, const struct level *portable) {
    const struct level *level;
    int64_t row_bytes = call->rows.count * call->shape->hidden * bytes_of(call->shape->dtype);
    int64_t angles = call->rows.count * call->shape->rotary * bytes_of(call->shape->dtype);
    void *wanted = run(call, portable, 1);
    for (int index = 0; (level = splitrun_level(index)); index++) {
        granted = 1;
        void *alone = run(call, level, 1);
        compare(call, alone, wanted, !rounds(level, call->shape), level->name, "a layer differs");
        for (int threads = 2; threads <= MOST_THREADS; threads += 5) {
            granted = 1 + (int)draw((uint32_t)threads);
            void *together = run(call, level, threads);
            if (memcmp(together, alone, (size_t)(call->rows.rows * row_bytes))) fault(level->name, "a team's layer differs");
            free(together);
        }
        struct call second = *call;
        second.rows.rows = 1, second.rows.table_starts++, second.rows.skips++, second.rows.lengths++;
        second.in = (const uint8_t *)call->in + row_bytes;
        second.cosines = (const uint8_t *)call->cosines + angles, second.sines = (const uint8_t *)call->sines + angles;
        void *row = run(&second, level, 1);
        if (memcmp(row, (const uint8_t *)alone + row_bytes, (size_t)row_bytes)) fault(level->name, "a row alone differs");
        free(row), free(alone);
    }
    free(wanted);
}

static void spoil(const struct shape *shape, struct layer *layer, int64_t block, int64_t slot, float value) {
    int64_t at = (block * shape->kv_heads * shape->slots + slot) * shape->width;
    if (shape->kv_dtype == FP32) ((float *)layer->block.keys)[at] = ((float *)layer->block.values)[at + 1] = value;
    if (shape->kv_dtype == INT8_KV)
        layer->block.key_scales[at / shape->width] = layer->block.value_scales[at / shape->width] = value;
    if (shape->kv_dtype == BF16 || shape->kv_dtype == FP16) {
        uint16_t bits = shape->kv_dtype == BF16 ? 0x7f80 : 0x7c00; /* infinity */
        ((uint16_t *)layer->block.keys)[at] = ((uint16_t *)layer->block.values)[at + 1] = isnan(value) ? bits + 1 : bits;
    }
}

static void check(const struct shape *shape, int64_t first_length, int64_t second_length, int64_t count,
                  int spoiled, const struct level *portable) {
    struct layer layers[LAYERS];
    int64_t each = MOST_SLOTS / shape->slots < BLOCKS / ROWS ? MOST_SLOTS / shape->slots : BLOCKS / ROWS;
    int64_t tables[BLOCKS], starts[ROWS] = {0, each}, skips[ROWS] = {0, 1}, lengths[ROWS] = {first_length, second_length};
    int64_t tokens = ROWS * count, room = each * shape->slots - count - 1, order[BLOCKS];
    for (int i = 0; i < ROWS; i++) lengths[i] = lengths[i] < room ? lengths[i] : room;
    for (int i = 0; i < BLOCKS; i++) order[i] = i;
    for (int i = 0; i < ROWS * each; i++) { /* blocks in no order */
        int other = i + (int)draw((uint32_t)(BLOCKS - i));
        int64_t kept = order[i];
        tables[i] = order[i] = order[other], order[other] = kept;
    }
    for (int i = 0; i < LAYERS; i++) layers[i] = random_layer(shape);
    void *in = random_values(tokens * shape->hidden, shape->dtype, 1.0f);
    void *cosines = random_values(tokens * shape->rotary, shape->dtype, 1.0f);
    void *sines = random_values(tokens * shape->rotary, shape->dtype, 1.0f);
    void *table = copy_of(tables, ROWS * each * 8); /* as long as it must be */
    struct call call = {shape, layers, {table, starts, skips, lengths, ROWS, count}, in, cosines, sines};
    /* Behind the new tokens anything may lie. */
    int64_t behind = skips[0] + lengths[0] + count;
    if (behind < each * shape->slots) spoil(shape, &layers[0], tables[behind / shape->slots], behind % shape->slots, NAN);
    check_call(&call, portable);
    if (spoiled) { /* what the first row sees is its own affair */
        spoil(shape, &layers[0], tables[(lengths[0] - 1) / shape->slots], (lengths[0] - 1) % shape->slots, INFINITY);
        check_call(&call, portable);
        spoil(shape, &layers[1], tables[0], 1 % shape->slots, NAN);
        check_call(&call, portable);
    }
    for (int i = 0; i < LAYERS; i++) free_layer(&layers[i]);
    free(in), free(cosines), free(sines), free(table);
}

static void check_norms(const struct level *level, const struct level *portable, int dtype, int64_t columns) {
    int64_t bytes = 3 * columns * bytes_of(dtype);
    void *x = random_values(3 * columns, dtype, 3.0f), *weight = random_values(columns, dtype, 1.0f);
    void *found = array(bytes), *wanted = array(bytes);
    float *scratch = array(columns * 4);
    splitrun_norm(level, x, weight, dtype, 3, columns, 1e-5f, found, scratch);
    splitrun_norm(portable, x, weight, dtype, 3, columns, 1e-5f, wanted, scratch);
    if (memcmp(found, wanted, (size_t)bytes)) fault(level->name, "a norm differs");
    free(x), free(weight), free(found), free(wanted), free(scratch);
}

static void check_reading(void) {
    int64_t words = 5 * 8192 + 77;
    uint64_t *memory = array(words * 8), sum = 0;
    for (int64_t i = 0; i < words; i++) sum += memory[i] = i < 5 * 8192 ? (uint64_t)draw(1 << 20) : 0;
    for (granted = 1; granted <= 3; granted++)
        if (splitrun_read(memory, words * 8, 3) != sum) fault("reading", "a sum differs");
    free(memory);
}

int main(void) {
    static const int kv_dtypes[] = {FP32, BF16, FP16, INT8_KV};
    static const int64_t lengths[][3] = {{0, 3, 2}, {5, 70, 1}, {601, 13, 3}, {64, 511, 8}}; /* of two rows; new tokens */
    const struct level *level, *portable = 0;
    for (int index = 0; splitrun_level(index); index++) portable = splitrun_level(index);
    splitrun_use_openmp((void *)parallel, (void *)number_in_team);
#ifdef TEAMS_ONLY
    for (int kv = 3; kv < 4; kv++)
#else
    for (int kv = 0; kv < 4; kv++)
#endif
        for (int i = 0; i < 4; i++) {
            struct shape shapes[] = {
                {NF4, BF16, kv_dtypes[kv], 64, 192, 4, 2, 48, 48, 0, 1, 33},
                {NF4, FP16, kv_dtypes[kv], 192, 64, 12, 4, 16, 6, i % 2 ? 67 : 2, 0, 70},
                {INT8, BF16, kv_dtypes[kv], 100, 68, 20, 1, 32, 32, 0, 0, 130},
                {BF16_ROWS, BF16, kv_dtypes[kv], 77, 91, 5, 5, 64, 64, 0, 1, 64},
                {FP16_ROWS, FP16, kv_dtypes[kv], 35, 45, 7, 1, 144, 100, 0, 0, 32},
            };
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
                check(&shapes[s], lengths[i][0], lengths[i][1], lengths[i][2], i % 2 == 0 && i, portable);
        }
    check_reading();
    for (int index = 0; (level = splitrun_level(index)); index++) {
        for (int dtype = FP32; dtype <= FP16; dtype++)
            for (int64_t columns = 1; columns < 100; columns += 49) check_norms(level, portable, dtype, columns);
        printf("%s\n", level->name);
    }
    return 0;
}
