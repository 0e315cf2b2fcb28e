/* The exponential function in plain arithmetic: the same bits at every level, error below 2e-7. NaN stays NaN. For 16 at
 * once it is written out: compilers do not turn comparisons of floats that might trap into vectors. */
#ifndef SPLITRUN_EXPONENTIAL_H
#define SPLITRUN_EXPONENTIAL_H

#include "lanes.h"

ALWAYS_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + ROUNDING, whole = shifted - ROUNDING;
    float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* ln 2 in two parts */
    float sum = 1.9875691500e-4f; /* coefficients as in Cephes' expf */
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    uint32_t power = bits_of(shifted) - bits_of(ROUNDING) + 127;
    return sum * float_of(power << 23);
}

ALWAYS_INLINE lanes exponentials(lanes x) {
    const lanes lowest = (lanes){0} - 87.0f, highest = (lanes){0} + 88.0f;
    x = chosen(x < lowest, lowest, x);
    x = chosen(x > highest, highest, x);
    lanes shifted = x * 1.44269504f + ROUNDING, whole = shifted - ROUNDING;
    lanes rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    lanes sum = (lanes){0} + 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    word_lanes power = (word_lanes)shifted - bits_of(ROUNDING) + 127;
    return sum * (lanes)(power << 23);
}

#endif
