/* What happens to rows of floats between the products, in plain loops that each level's file compiles for itself. */
#ifndef SPLITRUN_VECTORS_H
#define SPLITRUN_VECTORS_H

#include "exponential.h"
#include "lanes.h"

#define SMALLEST 1e-30f /* a group without a larger magnitude counts as zeros: its inverse could overflow */

/* Activations to int8: per group of 64 columns one scale, codes = value * 127 / largest magnitude, rounded to even. A
 * group with NaN or infinity gets the scale NaN, so that every product with it is NaN: visible, never a number. Columns
 * missing in the last group are zeros. unit: what a scale is multiplied with (the inverse of the code ranges). */
static void quantize_row(const void *x, int dtype, int64_t columns, float unit, int8_t *codes, float *scales,
                         int32_t *offsets) {
    for (int64_t start = 0; start < columns; start += GROUP) {
        int count = columns - start < GROUP ? (int)(columns - start) : GROUP;
        float values[GROUP] = {0};
        int32_t largest = 0, sum = 0;
        load_values(x, dtype, start, count, values);
        for (int i = 0; i < GROUP; i++) {
            int32_t magnitude = (int32_t)(bits_of(values[i]) & 0x7fffffff);
            largest = magnitude > largest ? magnitude : largest;
        }
        float inverse = 0.0f, scale = 0.0f;
        if (largest >= 0x7f800000) {
            scale = float_of(0x7fc00000);
            memset(values, 0, sizeof values);
        } else if (float_of((uint32_t)largest) >= SMALLEST) {
            inverse = 127.0f / float_of((uint32_t)largest);
            scale = float_of((uint32_t)largest) * unit;
        }
        for (int i = 0; i < GROUP; i++) {
            int32_t code = (int32_t)((values[i] * inverse + ROUNDING) - ROUNDING);
            codes[start + i] = (int8_t)code;
            sum += code;
        }
        scales[start / GROUP] = scale;
        offsets[start / GROUP] = -128 * sum;
    }
}

/* out = values / root mean square * weight; out may be values. */
static void norm_row(const float *values, const void *weight, int dtype, int64_t count, float epsilon, float *out) {
    lanes sums = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += load_lanes(values + i) * load_lanes(values + i);
    for (; i < count; i++) sums[0] += values[i] * values[i];
    float factor = 1.0f / __builtin_sqrtf(sum_of_lanes(sums) / (float)count + epsilon);
    for (i = 0; i < count; i += GROUP) {
        int part = count - i < GROUP ? (int)(count - i) : GROUP;
        float weights[GROUP];
        load_values(weight, dtype, i, part, weights);
        for (int at = 0; at < part; at++) out[i + at] = values[i + at] * factor * weights[at];
    }
}

/* Rotate the halves of a head against each other, times scale. Modifies the head. */
static void rotate_row(float *head, const float *cosines, const float *sines, int width, float scale) {
    float *high = head + width / 2;
    for (int i = 0, other = width / 2; i < width / 2; i++, other++) {
        float a = head[i], b = high[i];
        head[i] = (a * cosines[i] - b * sines[i]) * scale;
        high[i] = (b * cosines[other] + a * sines[other]) * scale;
    }
}

/* gates = gates * sigmoid(gates) * ups. */
static void gate_row(float *gates, const float *ups, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        lanes gate = load_lanes(gates + i);
        store_lanes(gates + i, gate / (1.0f + exponentials(-gate)) * load_lanes(ups + i));
    }
    for (; i < count; i++) gates[i] = gates[i] / (1.0f + exponential(-gates[i])) * ups[i];
}

#endif
