/* Every level against portable C, bit for bit (dot products of bf16: nearly), with sizes that are multiples of nothing,
 * in memory that a sanitizer watches: each array is as long as it must be and no longer. Prints the levels; status 1 with a
 * line on the first fault. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

const struct level *splitrun_level(int32_t index);
int64_t splitrun_scratch_bytes(int64_t rows, int64_t columns);
void splitrun_pack(const struct weight *, int64_t, int64_t, const uint8_t *, const float *);
void splitrun_unpack(const struct weight *, int64_t, int64_t, uint8_t *, float *);
void splitrun_quantize(const struct weight *, int64_t, int64_t, const void *, int32_t, int32_t);
void splitrun_product(const struct level *, const struct weight *, const void *, int32_t, int32_t, const void *, void *,
                      void *, int32_t);
void splitrun_choose(const struct level *, const struct weight *, const void *, int32_t, int32_t, float *, int64_t *,
                     void *, int32_t);
int64_t splitrun_choose_scratch_bytes(int64_t rows, int64_t columns, int32_t threads);
int32_t splitrun_values(const struct level *, const struct weight *, const int64_t *, int64_t, int64_t, int32_t, void *,
                        int32_t);

static uint32_t state = 1;

static float noise(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

static void *array(int64_t bytes) {
    void *memory = malloc(bytes ? (size_t)bytes : 1);
    if (!memory) exit(2);
    return memory;
}

static void same(const void *found, const void *expected, int64_t bytes, const char *level, const char *what) {
    if (memcmp(found, expected, (size_t)bytes) == 0) return;
    printf("%s: %s differs\n", level, what);
    exit(1);
}

static void fill(void *values, int64_t count, int dtype) {
    for (int64_t i = 0; i < count; i++) {
        float value = noise();
        uint16_t half = 0;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        half = dtype == BF16 ? (uint16_t)(bits >> 16) : (uint16_t)(0x3000 | (bits & 0x83ff));
        if (dtype == FP32)
            ((float *)values)[i] = value;
        else
            ((uint16_t *)values)[i] = half;
    }
}

static float value_at(const void *values, int dtype, int64_t index) {
    uint16_t half = ((const uint16_t *)values)[index];
    float value;
    uint32_t bits = (uint32_t)half << 16;
    if (dtype == FP32) return ((const float *)values)[index];
    if (dtype == FP16) { /* finite ones suffice: order is all that counts */
        float magnitude = (float)(half & 0x7fff);
        return half & 0x8000 ? -magnitude : magnitude;
    }
    memcpy(&value, &bits, 4);
    return value;
}

/* The largest of each row of a product, found without it. */
static void check_choice(const struct level *level, const struct weight *weight, const void *x, int dtype, int count,
                         const void *product) {
    float *values = array(count * 4);
    int64_t *ids = array(count * 8);
    void *scratch = array(splitrun_choose_scratch_bytes(count, weight->columns, 3));
    splitrun_choose(level, weight, x, dtype, count, values, ids, scratch, 3);
    for (int row = 0; row < count; row++) {
        int64_t best = 0;
        for (int64_t i = 1; i < weight->rows; i++)
            if (value_at(product, dtype, row * weight->rows + i) > value_at(product, dtype, row * weight->rows + best))
                best = i;
        if (ids[row] != best) printf("%s: a choice differs\n", level->name), exit(1);
    }
    free(values);
    free(ids);
    free(scratch);
}

/* Outputs of bf16, whose sums ran in another order: half a unit of bf16 for each, more where terms cancel. */
static void near(const void *found, const void *expected, int64_t count, const char *level) {
    for (int64_t i = 0; i < count; i++) {
        float a = value_at(found, BF16, i), b = value_at(expected, BF16, i), gap = a > b ? a - b : b - a;
        if (!(gap <= 1e-3f + (b > 0 ? b : -b) / 128.0f)) printf("%s: a dot product is off\n", level), exit(1);
    }
}

/* Products with 1 to 16 rows. */
static void check_products(const struct level *level, const struct level *portable, const struct weight *weight,
                           const void *x, const void *bias, int dtype) {
    int64_t width = dtype == FP32 ? 4 : 2;
    void *scratch = array(splitrun_scratch_bytes(MOST_ROWS, weight->columns));
    for (int count = 1; count <= MOST_ROWS; count++) {
        void *product = array(count * weight->rows * width), *wanted = array(count * weight->rows * width);
        splitrun_product(level, weight, x, dtype, count, count % 2 ? bias : 0, product, scratch, 1);
        splitrun_product(portable, weight, x, dtype, count, count % 2 ? bias : 0, wanted, scratch, 1);
        if (weight->format == BF16_ROWS && level->dots)
            near(product, wanted, count * weight->rows, level->name);
        else
            same(product, wanted, count * weight->rows * width, level->name, "a product");
        if (count % 2 == 0) check_choice(level, weight, x, dtype, count, product);
        free(product);
        free(wanted);
    }
    free(scratch);
}

/* A plain matrix in 16-bit floats, at an address that only 2 divides. */
static void check_dense(const struct level *level, const struct level *portable, int64_t rows, int64_t columns, int dtype) {
    uint16_t *storage = array(rows * columns * 2 + 2);
    struct weight weight = {(uint8_t *)(storage + 1), 0, rows, columns, dtype == BF16 ? BF16_ROWS : FP16_ROWS};
    void *x = array(MOST_ROWS * columns * 2), *bias = array(rows * 2);
    fill(storage + 1, rows * columns, dtype);
    fill(x, MOST_ROWS * columns, dtype);
    fill(bias, rows, dtype);
    check_products(level, portable, &weight, x, bias, dtype);
    free(storage);
    free(x);
    free(bias);
}

static void check(const struct level *level, const struct level *portable, int format, int64_t rows, int64_t columns,
                  int dtype) {
    int64_t code_bytes = rows * (format == NF4 ? columns / 2 : columns);
    int64_t scale_count = rows * (format == NF4 ? columns / GROUP : 1), width = dtype == FP32 ? 4 : 2;
    int64_t nbytes = format == NF4 ? rows * columns / GROUP * GROUP_LINES * 4 : code_bytes;
    uint8_t *storage = array(nbytes + 1), *codes = array(code_bytes), *again = array(code_bytes);
    float *scales = array(scale_count * 4), *plain_scales = array(scale_count * 4), *scales_again = array(scale_count * 4);
    struct weight weight = {storage + 1, format == NF4 ? 0 : scales, rows, columns, format}; /* codes at an odd address */
    void *values = array(rows * columns * width), *x = array(MOST_ROWS * columns * width), *bias = array(rows * width);
    void *found = array(rows * columns * width), *expected = array(rows * columns * width);
    int64_t ids[2] = {rows - 1, 0}, beyond = rows;
    fill(values, rows * columns, dtype);
    fill(x, MOST_ROWS * columns, dtype);
    fill(bias, rows, dtype);
    splitrun_quantize(&weight, rows / 2, rows - rows / 2, (uint8_t *)values + rows / 2 * columns * width, dtype, 1);
    splitrun_quantize(&weight, 0, rows / 2, values, dtype, 1);
    splitrun_unpack(&weight, 0, rows, codes, plain_scales);
    memset(storage, 0, (size_t)nbytes + 1);
    splitrun_pack(&weight, 0, rows, codes, plain_scales);
    splitrun_unpack(&weight, 0, rows, again, scales_again);
    same(again, codes, code_bytes, level->name, "what comes out of the layout");
    same(scales_again, plain_scales, scale_count * 4, level->name, "what comes out as scales");
    splitrun_values(level, &weight, 0, 0, rows, dtype, found, 1);
    splitrun_values(portable, &weight, 0, 0, rows, dtype, expected, 1);
    same(found, expected, rows * columns * width, level->name, "a value");
    splitrun_values(level, &weight, ids, 0, 2 < rows ? 2 : rows, dtype, found, 1);
    same(found, (uint8_t *)expected + (rows - 1) * columns * width, columns * width, level->name, "a gathered row");
    if (splitrun_values(level, &weight, &beyond, 0, 1, dtype, found, 1) != -1) exit(1);
    check_products(level, portable, &weight, x, bias, dtype);
    void *all[] = {storage, codes, again, scales, plain_scales, scales_again, values, x, bias, found, expected};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

int main(void) {
    static const int64_t heights[] = {1, 15, 16, 17, 33, 50}, nf4_widths[] = {64, 128, 320},
                         int8_widths[] = {4, 60, 64, 68, 132, 260};
    const struct level *level, *portable = 0;
    for (int index = 0; splitrun_level(index); index++) portable = splitrun_level(index);
    for (int index = 0; (level = splitrun_level(index)); index++) {
        for (int dtype = FP32; dtype <= FP16; dtype++)
            for (size_t h = 0; h < sizeof heights / sizeof *heights; h++) {
                for (size_t w = 0; w < sizeof nf4_widths / sizeof *nf4_widths; w++)
                    check(level, portable, NF4, heights[h], nf4_widths[w], dtype);
                for (size_t w = 0; w < sizeof int8_widths / sizeof *int8_widths; w++) {
                    check(level, portable, INT8, heights[h], int8_widths[w], dtype);
                    if (dtype != FP32) check_dense(level, portable, heights[h], int8_widths[w] + 1, dtype);
                }
            }
        printf("%s\n", level->name);
    }
    return 0;
}
