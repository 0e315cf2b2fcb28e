/* Activations to int8: per group of 64 columns one scale, codes = value * 127 / largest magnitude, rounded to even. */
#include "convert.h"
#include "kernels.h"

#define SMALLEST 1e-30f /* a group without a larger magnitude counts as zeros: its inverse could overflow */

/* A group with NaN or infinity gets the scale NaN, so that every product with it is NaN: visible, never a number.
 * Columns missing in the last group are zeros. unit: what a scale is multiplied with (the inverse of the code ranges). */
void quantize_row(const void *x, int dtype, int64_t columns, float unit, int8_t *codes, float *scales,
                  int32_t *offsets) {
    for (int64_t start = 0; start < columns; start += GROUP) {
        int count = columns - start < GROUP ? (int)(columns - start) : GROUP;
        float values[GROUP] = {0};
        uint32_t largest = 0;
        int32_t sum = 0;
        load_values(x, dtype, start, count, values);
        for (int i = 0; i < GROUP; i++) {
            uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        float inverse = 0.0f, scale = 0.0f;
        if (largest >= 0x7f800000) {
            scale = float_of(0x7fc00000);
            memset(values, 0, sizeof values);
        } else if (float_of(largest) >= SMALLEST) {
            inverse = 127.0f / float_of(largest);
            scale = float_of(largest) * unit;
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
