/* Products of many rows in every arithmetic, tile instructions emulated, in memory that a sanitizer watches.
 *
 * int8 with a span of one group: the bits of portable C's product of few rows. int8 on tiles: the bits of int8 without
 * them. bf16: within its bound of the sums in double. Prints the kernels that ran; status 1 with a line on a fault. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static void close_to_double(uint16_t *found, const struct sample *sample, const char *name) {
    int64_t rows = sample->weight.rows, columns = sample->weight.columns;
    uint16_t *values = array(rows * columns * 2);
    splitrun_values(&level_portable, &sample->weight, 0, 0, rows, BF16, values, 1);
    for (int64_t row = 0; row < sample->count; row++)
        for (int64_t output = 0; output < rows; output++) {
            double sum = value_of(sample->bias[output]), most = fabs(sum);
            for (int64_t i = 0; i < columns; i++) {
                double term = value_of(sample->x[row * columns + i]) * value_of(values[output * columns + i]);
                sum += term;
                most += fabs(term);
            }
            double error = fabs(value_of(found[row * rows + output]) - sum);
            if (!(error <= fabs(sum) / 256 + most * (double)columns / (1 << 23))) {
                printf("%s: a product is %g off\n", name, error);
                exit(1);
            }
        }
    free(values);
    free(found);
}

static void check(int format, int64_t rows, int64_t columns, int64_t count) {
    int64_t code_bytes = rows * (format == NF4 ? columns / 2 : columns);
    int64_t scale_count = rows * (format == NF4 ? columns / GROUP : 1);
    uint8_t *storage = array(code_bytes + 1);
    float *scales = array(scale_count * 4);
    struct sample sample = {{storage + 1, scales, rows, columns, format}, count, array(count * columns * 2),
                            array(rows * 2)};
    uint16_t *values = array(rows * columns * 2);
    fill(values, rows * columns);
    fill(sample.x, count * columns);
    fill(sample.bias, rows);
    splitrun_quantize(&sample.weight, 0, rows, values, BF16, 1);
    close_to_double(product(&many_amx_bf16, &sample), &sample, "amx-bf16");
    if (__builtin_cpu_supports("avx512bf16")) close_to_double(product(&many_avx512bf16, &sample), &sample, "avx512bf16");
    same(product(&many_avx512int8, &sample), few(&sample), count * rows, "avx512int8");
    same(product(&many_amx_int8, &sample), product(&many_avx512int8_wide, &sample), count * rows, "amx-int8");
    free(values);
    free(storage);
    free(scales);
    free(sample.x);
    free(sample.bias);
}

int main(void) {
    static const int64_t heights[] = {1, 75}, nf4_widths[] = {64, 1088},
                         int8_widths[] = {4, 132, 1100}, counts[] = {17, 48};
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return 77;
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
        for (size_t h = 0; h < sizeof heights / sizeof *heights; h++) {
            for (size_t w = 0; w < sizeof nf4_widths / sizeof *nf4_widths; w++)
                check(NF4, heights[h], nf4_widths[w], counts[c]);
            for (size_t w = 0; w < sizeof int8_widths / sizeof *int8_widths; w++)
                check(INT8, heights[h], int8_widths[w], counts[c]);
        }
    printf("amx-bf16 avx512bf16 avx512int8 amx-int8\n");
    return 0;
}
