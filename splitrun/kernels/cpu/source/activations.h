/* Activations in scratch memory, in the form that a weight's format multiplies: int8 codes, or fp32. */
#ifndef SPLITRUN_ACTIVATIONS_H
#define SPLITRUN_ACTIVATIONS_H

#include "convert.h"

ALWAYS_INLINE int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

/* Bytes of a row in either form. */
ALWAYS_INLINE int64_t activation_bytes(int64_t columns) {
    return groups_of(columns) * (int64_t)(GROUP * (1 + sizeof(float)) + sizeof(float) + sizeof(int32_t));
}

ALWAYS_INLINE struct activations activations_in(void *scratch, int64_t rows, int64_t columns) {
    int64_t groups = groups_of(columns);
    float *values = scratch, *scales = values + rows * groups * GROUP;
    int32_t *offsets = (int32_t *)(scales + rows * groups);
    struct activations x = {(int8_t *)(offsets + rows * groups), scales, offsets, groups * GROUP, groups, values,
                            groups * GROUP};
    return x;
}

/* Values to bf16, from an index on. */
ALWAYS_INLINE void round_values(const void *values, int dtype, int64_t count, int64_t start, void *out) {
    for (int64_t at = 0; at < count; at += GROUP) {
        float part[GROUP];
        int few = count - at < GROUP ? (int)(count - at) : GROUP;
        load_values(values, dtype, at, few, part);
        store_values(part, BF16, start + at, few, out);
    }
}

/* Set count columns of a row, from a multiple of the group on. */
ALWAYS_INLINE void set_activations(const struct level *level, int format, const struct activations *x, int64_t row,
                                   int64_t start, const void *values, int dtype, int64_t count) {
    int64_t group = row * x->group_stride + start / GROUP;
    float unit = format == NF4 ? (1.0f / 127.0f) * (1.0f / 127.0f) : 1.0f / 127.0f;
    if (format == NF4 || format == INT8)
        level->quantize(values, dtype, count, unit, x->codes + row * x->code_stride + start,
                        x->scales + group, x->offsets + group);
    else if (format == BF16_ROWS && level->dots)
        round_values(values, dtype, count, start, x->values + row * x->value_stride);
    else
        load_values(values, dtype, 0, (int)count, x->values + row * x->value_stride + start);
}

#endif
