/* Values to nf4 and int8 in the layout, without temporaries: the codes and scales that the formats' definitions give. */
#include "convert.h"
#include "kernels.h"
#include "layout.h"
#include "shares.h"

#define LEAST_MAXIMUM 1e-38f

struct quantization {
    const struct weight *weight;
    const uint8_t *values;
    int64_t first, count;
    int dtype;
    struct shares shares;
    struct team team;
};

static float largest_magnitude(const float *values, int count) {
    float largest = 0.0f;
    for (int i = 0; i < count; i++) {
        float magnitude = float_of(bits_of(values[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* The nearest entry's index: how many borders, half way between two entries, lie below the value. */
static void nf4_block(const float *values, struct place *place) {
    float largest = largest_magnitude(values, GROUP), borders[15];
    float inverse = 1.0f / (largest > LEAST_MAXIMUM ? largest : LEAST_MAXIMUM);
    int32_t codes[GROUP] = {0};
    for (int i = 0; i < 15; i++) borders[i] = (nf4_table[i] + nf4_table[i + 1]) / 2;
    for (int border = 0; border < 15; border++)
        for (int i = 0; i < GROUP; i++) codes[i] += values[i] * inverse > borders[border];
    for (int line = 0; line < 8; line++, place->codes += place->stride)
        for (int i = 0; i < 4; i++) place->codes[i] = (uint8_t)(codes[line * 8 + i] | codes[line * 8 + 4 + i] << 4);
    memcpy(place->codes, &largest, 4);
    place->codes += place->stride;
}

static void nf4_values(const void *values, int dtype, int64_t columns, struct place place) {
    float block[GROUP];
    for (int64_t start = 0; start < columns; start += GROUP) {
        load_values(values, dtype, start, GROUP, block);
        nf4_block(block, &place);
    }
}

static void int8_values(const void *values, int dtype, int64_t columns, struct place place, float *scale) {
    float part[GROUP], largest = 0.0f;
    for (int64_t start = 0; start < columns; start += GROUP) {
        int count = columns - start < GROUP ? (int)(columns - start) : GROUP;
        load_values(values, dtype, start, count, part);
        float magnitude = largest_magnitude(part, count);
        largest = magnitude > largest ? magnitude : largest;
    }
    *scale = largest * (float)(1.0 / 127.0);
    float divisor = *scale > 0.0f ? *scale : 1.0f;
    for (int64_t start = 0; start < columns; start += GROUP) {
        int count = columns - start < GROUP ? (int)(columns - start) : GROUP;
        int8_t codes[GROUP];
        load_values(values, dtype, start, count, part);
        for (int i = 0; i < count; i++) {
            float code = (part[i] / divisor + ROUNDING) - ROUNDING;
            codes[i] = (int8_t)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
        }
        for (int i = 0; i < count; i += 4, place.codes += place.stride) memcpy(place.codes, codes + i, 4);
    }
}

static void quantize_rows(void *argument) {
    struct quantization *work = argument;
    const struct weight *weight = work->weight;
    int member = join_team(&work->team.arrived, work->shares.members);
    int64_t width = work->dtype == FP32 ? 4 : 2;
    for (int64_t task; (task = take(&work->shares, member)) >= 0;) {
        int64_t last = (task + 1) * TILE < work->count ? (task + 1) * TILE : work->count;
        for (int64_t row = task * TILE; row < last; row++) {
            const uint8_t *values = work->values + row * weight->columns * width;
            struct place place = place_of(weight, work->first + row);
            if (weight->format == NF4)
                nf4_values(values, work->dtype, weight->columns, place);
            else
                int8_values(values, work->dtype, weight->columns, place, weight->scales + work->first + row);
        }
    }
}

/* Set rows from first on to finite values. Shape of values: (count, columns), contiguous. */
EXPORT void splitrun_quantize(const struct weight *weight, int64_t first, int64_t count, const void *values,
                              int32_t dtype, int32_t threads) {
    struct quantization work = {.weight = weight, .values = values, .first = first, .count = count, .dtype = dtype};
    threads = count * row_bytes(weight) < ALONE_BYTES ? 1 : threads;
    work.shares = share((count + TILE - 1) / TILE, members_of(threads), work.team.runs);
    run_team(threads, quantize_rows, &work);
}
