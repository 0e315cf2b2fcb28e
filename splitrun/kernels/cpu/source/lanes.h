/* Sixteen floats side by side, in the compiler's vector types: each level's file compiles them to its own registers.
 * Sums over a row always run in 16 partial sums that are then added pairwise: the order is part of the definition. */
#ifndef SPLITRUN_LANES_H
#define SPLITRUN_LANES_H

#include "convert.h"

#define LANES 16

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t integer_lanes __attribute__((vector_size(64)));
typedef uint32_t word_lanes __attribute__((vector_size(64)));
/* The same in memory, at any address. */
typedef float stored_lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t stored_halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t stored_bytes __attribute__((vector_size(16), aligned(1), may_alias));

ALWAYS_INLINE lanes load_lanes(const float *from) { return *(const stored_lanes *)from; }
ALWAYS_INLINE void store_lanes(float *to, lanes values) { *(stored_lanes *)to = values; }

ALWAYS_INLINE lanes chosen(integer_lanes condition, lanes yes, lanes no) {
    return (lanes)((condition & (integer_lanes)yes) | (~condition & (integer_lanes)no));
}

ALWAYS_INLINE lanes fp16_lanes(word_lanes halves) {
    word_lanes sign = (halves & 0x8000) << 16, rest = (halves & 0x7fff) << 13;
    lanes finite = (lanes)rest * 0x1p112f; /* also right for subnormal halves */
    lanes special = (lanes)(rest | 0x7f800000);
    return (lanes)((word_lanes)chosen((halves & 0x7c00) == 0x7c00, special, finite) | sign);
}

#ifndef OWN_WIDEN
ALWAYS_INLINE word_lanes widen(const uint16_t *from) {
    return __builtin_convertvector(*(const stored_halves *)from, word_lanes);
}

ALWAYS_INLINE lanes widen_bytes(const int8_t *from) {
    return __builtin_convertvector(*(const stored_bytes *)from, lanes);
}
#endif

/* 16 values of a type, from the index-th on. */
ALWAYS_INLINE lanes load_as_lanes(const void *values, const int dtype, int64_t index) {
    if (dtype == FP32) return load_lanes((const float *)values + index);
    if (dtype == INT8_KV) return widen_bytes((const int8_t *)values + index);
    word_lanes halves = widen((const uint16_t *)values + index);
    return dtype == BF16 ? (lanes)(halves << 16) : fp16_lanes(halves);
}

ALWAYS_INLINE float sum_of_lanes(lanes values) {
    float sums[LANES];
    store_lanes(sums, values);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

/* A larger value replaces a lane's, NaN never does. */
ALWAYS_INLINE lanes larger(lanes values, lanes others) { return chosen(others > values, others, values); }

#define HALVES(a, b, ...)                                    \
    (__builtin_shuffle(a, b, (integer_lanes){__VA_ARGS__}) + \
     __builtin_shuffle(a, b, (integer_lanes){__VA_ARGS__} + step))

ALWAYS_INLINE lanes eighths(lanes a, lanes b) {
    const int step = 8;
    return HALVES(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
}
ALWAYS_INLINE lanes quarters(lanes a, lanes b) {
    const int step = 4;
    return HALVES(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
ALWAYS_INLINE lanes pairs(lanes a, lanes b) {
    const int step = 2;
    return HALVES(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
}
ALWAYS_INLINE lanes singles(lanes a, lanes b) {
    const int step = 1;
    return HALVES(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

ALWAYS_INLINE lanes four_sums(const lanes *rows) { return quarters(eighths(rows[0], rows[1]), eighths(rows[2], rows[3])); }
ALWAYS_INLINE lanes eight_sums(const lanes *rows) { return pairs(four_sums(rows), four_sums(rows + 4)); }

/* The sums of 16 vectors, each as sum_of_lanes gives it. */
ALWAYS_INLINE lanes sixteen_sums(const lanes *rows) { return singles(eight_sums(rows), eight_sums(rows + 8)); }

#endif
