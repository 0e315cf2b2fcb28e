/* Products of many rows in every arithmetic, tile instructions emulated, in memory that a sanitizer watches.
 *
 * int8 with a span of one group: the bits of portable C's product of few rows. int8 on tiles: the bits of int8 without
 * them. int16: the same bits in every instruction set. bf16, fp32 and int16: within a bound of the sums in double. A chunk
 * of a prompt: near the same layer token by token. Prints the kernels that ran; status 1 with a line on a fault. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "block.h"
#include "panels.h"

int64_t splitrun_scratch_bytes(int64_t rows, int64_t columns);
void splitrun_quantize(const struct weight *, int64_t, int64_t, const void *, int32_t, int32_t);
void splitrun_product(const struct level *, const struct weight *, const void *, int32_t, int32_t, const void *, void *,
                      void *, int32_t);
int32_t splitrun_values(const struct level *, const struct weight *, const int64_t *, int64_t, int64_t, int32_t, void *,
                        int32_t);
int64_t splitrun_many_scratch_bytes(const struct many *, int64_t, int64_t, int64_t);
void splitrun_many_product(const struct many *, const struct weight *, const void *, int32_t, int64_t, const void *, void *,
                           void *, int32_t);

int64_t splitrun_layers_scratch_bytes(const struct block *const *, const struct rows *const *, int32_t, int32_t);
void splitrun_layers(const struct level *, const struct block *const *, const struct rows *const *, int32_t,
                     const void *, const void *, const void *, void *, void *, int32_t);
int64_t splitrun_chunk_scratch_bytes(const struct many *, const struct block *, int64_t, int64_t);
void splitrun_chunk(const struct many *, const struct many *, const struct block *, const struct rows *, const void *,
                    const void *, const void *, void *, void *, int32_t);

static uint32_t state = 1;

static void fill(uint16_t *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        float value = (float)(state >> 8) / 8388608.0f - 1.0f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        values[i] = (uint16_t)(bits >> 16);
    }
}

static void *array(int64_t bytes) {
    void *memory = malloc((size_t)bytes);
    if (!memory) exit(2);
    return memory;
}

static double value_of(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

struct sample {
    struct weight weight;
    int64_t count;
    uint16_t *x, *bias;
};

static uint16_t *product(const struct many *many, const struct sample *sample) {
    int64_t rows = sample->weight.rows, columns = sample->weight.columns;
    uint16_t *out = array(sample->count * rows * 2);
    void *scratch = array(splitrun_many_scratch_bytes(many, sample->count, columns, 1));
    splitrun_many_product(many, &sample->weight, sample->x, BF16, sample->count, sample->bias, out, scratch, 1);
    free(scratch);
    return out;
}

static uint16_t *few(const struct sample *sample) {
    int64_t rows = sample->weight.rows, columns = sample->weight.columns;
    uint16_t *out = array(sample->count * rows * 2);
    void *scratch = array(splitrun_scratch_bytes(MOST_ROWS, columns));
    for (int64_t row = 0; row < sample->count; row += MOST_ROWS) {
        int64_t count = sample->count - row < MOST_ROWS ? sample->count - row : MOST_ROWS;
        splitrun_product(&level_portable, &sample->weight, sample->x + row * columns, BF16, (int32_t)count, sample->bias,
                         out + row * rows, scratch, 1);
    }
    free(scratch);
    return out;
}

static void same(uint16_t *found, uint16_t *expected, int64_t count, const char *name) {
    if (memcmp(found, expected, (size_t)count * 2) != 0) {
        printf("%s: a product differs\n", name);
        exit(1);
    }
    free(found);
    free(expected);
}

/* Shape of values: (rows, columns). Terms may be a share of themselves off. */
static void close_to_double(uint16_t *found, const struct sample *sample, const float *values, double share, const char *name) {
    int64_t rows = sample->weight.rows, columns = sample->weight.columns;
    for (int64_t row = 0; row < sample->count; row++)
        for (int64_t output = 0; output < rows; output++) {
            double sum = value_of(sample->bias[output]), most = fabs(sum);
            for (int64_t i = 0; i < columns; i++) {
                double term = value_of(sample->x[row * columns + i]) * (double)values[output * columns + i];
                sum += term;
                most += fabs(term);
            }
            double error = fabs(value_of(found[row * rows + output]) - sum);
            if (!(error <= fabs(sum) / 256 + most * (share + (double)columns / (1 << 23)))) {
                printf("%s: a product is %g off\n", name, error);
                exit(1);
            }
        }
    free(found);
}

/* The weight's values, rounded to a type. */
static float *values_of(const struct weight *weight, int dtype) {
    int64_t count = weight->rows * weight->columns;
    float *values = array(count * 4);
    uint16_t *rounded = array(count * 2);
    splitrun_values(&level_portable, weight, 0, 0, weight->rows, dtype, dtype == BF16 ? (void *)rounded : values, 1);
    for (int64_t i = 0; dtype == BF16 && i < count; i++) values[i] = (float)value_of(rounded[i]);
    free(rounded);
    return values;
}

static int has_avx512(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"); }

static void check_avx512(const struct sample *sample) {
    int64_t count = sample->count * sample->weight.rows;
    float *values = values_of(&sample->weight, BF16);
    close_to_double(product(&many_amx_bf16, sample), sample, values, 0, "amx-bf16");
    close_to_double(product(&many_avx512bf16, sample), sample, values, 0, "avx512bf16");
    same(product(&many_avx512int8, sample), few(sample), count, "avx512int8");
    same(product(&many_amx_int8, sample), product(&many_avx512int8_wide, sample), count, "amx-int8");
    same(product(&many_avx512int16, sample), product(&many_avx2int16, sample), count, "avx512int16");
    free(values);
}

static void check_avx2(const struct sample *sample) {
    float *values = values_of(&sample->weight, FP32);
    close_to_double(product(&many_avx2fp32, sample), sample, values, 0, "avx2fp32");
    close_to_double(product(&many_avx2int16, sample), sample, values, 0.001, "avx2int16");
    if (__builtin_cpu_supports("avxvnni"))
        same(product(&many_avx2vnniint16, sample), product(&many_avx2int16, sample), sample->count * sample->weight.rows,
             "avx2vnniint16");
    free(values);
}

static void check(int format, int64_t rows, int64_t columns, int64_t count) {
    uint8_t *storage = array(rows * (format == NF4 ? columns / GROUP * GROUP_LINES * 4 : columns) + 1);
    float *scales = format == NF4 ? 0 : array(rows * 4);
    struct sample sample = {{storage + 1, scales, rows, columns, format}, count, array(count * columns * 2),
                            array(rows * 2)};
    uint16_t *values = array(rows * columns * 2);
    fill(values, rows * columns);
    fill(sample.x, count * columns);
    fill(sample.bias, rows);
    splitrun_quantize(&sample.weight, 0, rows, values, BF16, 1);
    if (has_avx512()) check_avx512(&sample);
    check_avx2(&sample);
    free(values);
    free(storage);
    free(scales);
    free(sample.x);
    free(sample.bias);
}

enum { HIDDEN = 128, WIDTH = 48, HEADS = 4, KV_HEADS = 2, INNER = 192, TOKENS = 21, SLOTS = 4, BLOCKS = 8, HISTORY = 5 };

static struct weight random_weight(int64_t rows, int64_t columns) {
    struct weight weight = {array(rows * columns / GROUP * GROUP_LINES * 4), 0, rows, columns, NF4};
    uint16_t *values = array(rows * columns * 2);
    fill(values, rows * columns);
    splitrun_quantize(&weight, 0, rows, values, BF16, 1);
    for (int64_t group = 0; group < rows / TILE * columns / GROUP; group++)
        for (int lane = 0; lane < TILE; lane++) ((float *)(weight.codes + (group * GROUP_LINES + 8) * LINE))[lane] *= 0.1f;
    free(values);
    return weight;
}

static uint16_t *random_vector(int64_t count) {
    uint16_t *values = array(count * 2);
    fill(values, count);
    return values;
}

/* A layer token by token in portable C, and as a chunk; window 0: none. */
static void check_chunk(const struct many *many, const struct many *bf16, int64_t window) {
    int64_t kv = BLOCKS * KV_HEADS * SLOTS * WIDTH, table[BLOCKS] = {3, 0, 6, 1, 7, 2, 5, 4}, start = 0, skip = 1;
    int64_t length = HISTORY;
    struct weight weights[] = {random_weight(HEADS * WIDTH, HIDDEN), random_weight(KV_HEADS * WIDTH, HIDDEN),
                               random_weight(KV_HEADS * WIDTH, HIDDEN), random_weight(HIDDEN, HEADS * WIDTH),
                               random_weight(INNER, HIDDEN), random_weight(INNER, HIDDEN), random_weight(HIDDEN, INNER)};
    uint16_t *vectors[] = {random_vector(HEADS * WIDTH), random_vector(KV_HEADS * WIDTH), random_vector(KV_HEADS * WIDTH),
                           random_vector(HIDDEN), random_vector(HIDDEN), random_vector(HIDDEN), random_vector(WIDTH),
                           random_vector(WIDTH)};
    uint16_t *in = random_vector(TOKENS * HIDDEN), *cosines = random_vector(TOKENS * WIDTH),
             *sines = random_vector(TOKENS * WIDTH), *out = array(TOKENS * HIDDEN * 2), *one = array(TOKENS * HIDDEN * 2),
             *keys[2] = {random_vector(kv), array(kv * 2)}, *values[2] = {random_vector(kv), array(kv * 2)};
    memcpy(keys[1], keys[0], (size_t)kv * 2);
    memcpy(values[1], values[0], (size_t)kv * 2);
    for (int chunk = 0; chunk < 2; chunk++) {
        struct block block = {weights[0], weights[1], weights[2], weights[3], weights[4], weights[5], weights[6],
                              vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], vectors[5], vectors[6],
                              vectors[7], keys[chunk], values[chunk], 0, 0, SLOTS, window, HEADS, KV_HEADS, WIDTH, WIDTH, BF16,
                              BF16, 1e-6f, 0.144f, 1.0f};
        const struct block *blocks = &block;
        struct rows rows = {table, &start, &skip, &length, 1, chunk ? TOKENS : 1};
        const struct rows *all = &rows;
        void *scratch = array(chunk ? splitrun_chunk_scratch_bytes(many, &block, TOKENS, 1)
                                    : splitrun_layers_scratch_bytes(&blocks, &all, 1, 1));
        length = HISTORY;
        if (chunk) splitrun_chunk(many, bf16, &block, &rows, in, cosines, sines, out, scratch, 1);
        for (int64_t token = 0; !chunk && token < TOKENS; token++, length++)
            splitrun_layers(&level_portable, &blocks, &all, 1, in + token * HIDDEN, cosines + token * WIDTH,
                            sines + token * WIDTH, one + token * HIDDEN, scratch, 1);
        free(scratch);
    }
    double error = 0, norm = 0;
    for (int64_t i = 0; i < TOKENS * HIDDEN; i++) {
        double difference = value_of(out[i]) - value_of(one[i]);
        error += difference * difference;
        norm += value_of(one[i]) * value_of(one[i]);
    }
    if (!(error < 0.01 * 0.01 * norm)) {
        printf("%s: a chunk is off, %g of %g\n", many->name, error, norm);
        exit(1);
    }
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) free(weights[i].codes);
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) free(vectors[i]);
    void *all[] = {in, cosines, sines, out, one, keys[0], keys[1], values[0], values[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

int main(void) {
    static const int64_t heights[] = {1, 75, 270}, nf4_widths[] = {64, 1088},
                         int8_widths[] = {4, 132, 1100}, counts[] = {17, 48};
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
        for (size_t h = 0; h < sizeof heights / sizeof *heights; h++) {
            for (size_t w = 0; w < sizeof nf4_widths / sizeof *nf4_widths; w++)
                check(NF4, heights[h], nf4_widths[w], counts[c]);
            for (size_t w = 0; w < sizeof int8_widths / sizeof *int8_widths; w++)
                check(INT8, heights[h], int8_widths[w], counts[c]);
        }
    for (int64_t window = 0; window <= 7; window += 7) {
        check_chunk(&many_avx2fp32, &many_avx2fp32, window);
        check_chunk(&many_avx2int16, &many_avx2fp32, window);
        if (!has_avx512()) continue;
        check_chunk(&many_avx512int16, &many_avx2fp32, window);
        check_chunk(&many_avx512bf16, &many_avx512bf16, window);
        check_chunk(&many_avx512int8, &many_avx512bf16, window);
        check_chunk(&many_amx_bf16, &many_amx_bf16, window);
        check_chunk(&many_amx_int8, &many_amx_bf16, window);
    }
    printf("avx2fp32 avx2int16%s\n", has_avx512() ? " avx512int16 amx-bf16 avx512bf16 avx512int8 amx-int8" : "");
    return 0;
}
