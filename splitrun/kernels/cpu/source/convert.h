/* Conversions between fp32 and the 16-bit types, rounding to nearest even, NaN kept: plain C that compilers vectorise. */
#ifndef SPLITRUN_CONVERT_H
#define SPLITRUN_CONVERT_H

#include <string.h>

#include "kernels.h"

ALWAYS_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

ALWAYS_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

ALWAYS_INLINE float from_bf16(uint16_t value) { return float_of((uint32_t)value << 16); }

ALWAYS_INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

ALWAYS_INLINE float from_fp16(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, rest = (uint32_t)(value & 0x7fff) << 13;
    uint32_t finite = bits_of(float_of(rest) * 0x1p112f); /* also right for subnormal halves */
    uint32_t special = rest | 0x7f800000;
    return float_of(sign | ((value & 0x7c00) == 0x7c00 ? special : finite));
}

ALWAYS_INLINE uint16_t to_fp16(float value) {
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    uint32_t normal = (rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13;
    uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3f000000; /* the sum rounds at a subnormal half's last bit */
    uint32_t half = rest < 0x38800000 ? small : normal;
    half = rest >= 0x477ff000 ? 0x7c00 : half;
    half = rest > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(sign | half);
}

ALWAYS_INLINE float load_value(const void *values, int dtype, int64_t index) {
    if (dtype == BF16) return from_bf16(((const uint16_t *)values)[index]);
    if (dtype == FP16) return from_fp16(((const uint16_t *)values)[index]);
    return ((const float *)values)[index];
}

ALWAYS_INLINE void load_values(const void *values, int dtype, int64_t start, int count, float *out) {
    if (dtype == BF16)
        for (int i = 0; i < count; i++) out[i] = from_bf16(((const uint16_t *)values)[start + i]);
    else if (dtype == FP16)
        for (int i = 0; i < count; i++) out[i] = from_fp16(((const uint16_t *)values)[start + i]);
    else
        memcpy(out, (const float *)values + start, sizeof(float) * (size_t)count);
}

ALWAYS_INLINE void store_values(const float *values, int dtype, int64_t start, int count, void *out) {
    if (dtype == BF16)
        for (int i = 0; i < count; i++) ((uint16_t *)out)[start + i] = to_bf16(values[i]);
    else if (dtype == FP16)
        for (int i = 0; i < count; i++) ((uint16_t *)out)[start + i] = to_fp16(values[i]);
    else
        memcpy((float *)out + start, values, sizeof(float) * (size_t)count);
}

#endif
