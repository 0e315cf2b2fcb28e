/* What a prompt needs beside products, row by row, for every file that multiplies for attention: plain C for its compiler
 * to vectorise. The including file defines rapid_exponentials. */
#include "exponential.h"

#define LEAST_EXPONENT (-80.0f) /* what is weighed with less is nothing beside a weight of 1, and slow: a subnormal number */

/* gate * sigmoid(gate) * up. */
ALWAYS_INLINE lanes gated(lanes gate, lanes up) { return gate / (1.0f + rapid_exponentials(-gate)) * up; }

static float inverse_root(const float *values, int64_t count, float epsilon) {
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += values[i + lane] * values[i + lane];
    for (; i < count; i++) sums[0] += values[i] * values[i];
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    return 1.0f / __builtin_sqrtf(sums[0] / (float)count + epsilon);
}

static void norm_row(const float *values, const uint16_t *weight, int64_t count, float epsilon, float *out) {
    float factor = inverse_root(values, count, epsilon);
    for (int64_t i = 0; i < count; i++) out[i] = values[i] * factor * from_bf16(weight[i]);
}

static void turn_head(const float *head, const uint16_t *norm, const uint16_t *cosines, const uint16_t *sines, int width,
                      float epsilon, float scale, float *out) {
    float factor = norm ? inverse_root(head, width, epsilon) : 1.0f, values[MOST_CHUNK_WIDTH];
    int half = width / 2;
    for (int i = 0; i < width; i++) values[i] = norm ? head[i] * factor * from_bf16(norm[i]) : head[i];
    for (int i = 0; i < half; i++) {
        out[i] = (values[i] * from_bf16(cosines[i]) - values[i + half] * from_bf16(sines[i])) * scale;
        out[i + half] = (values[i + half] * from_bf16(cosines[i + half]) + values[i] * from_bf16(sines[i + half])) * scale;
    }
}

static void add_panel(float *sums, int64_t rows, int64_t count, const float *scales, const float *bias, float *target,
                      int64_t stride) {
    for (int64_t row = 0; row < rows; row++, sums += PANEL, target += stride) {
        for (int i = 0; scales && i < PANEL; i++) sums[i] = sums[i] * scales[i];
        for (int i = 0; bias && i < PANEL; i++) sums[i] = sums[i] + bias[i];
        for (int64_t i = 0; i < count; i++) target[i] = target[i] + sums[i];
    }
}

static void gate_panel(float *gates, float *ups, int64_t rows, int64_t count, const float *gate_scales,
                       const float *up_scales, float *target, int64_t stride) {
    for (int64_t row = 0; row < rows; row++, gates += PANEL, ups += PANEL, target += stride) {
        for (int i = 0; gate_scales && i < PANEL; i++) gates[i] = gates[i] * gate_scales[i];
        for (int i = 0; up_scales && i < PANEL; i++) ups[i] = ups[i] * up_scales[i];
        for (int i = 0; i < PANEL; i += LANES) {
            store_lanes(gates + i, gated(load_lanes(gates + i), load_lanes(ups + i)));
        }
        memcpy(target, gates, (size_t)count * sizeof(float));
    }
}

static void scale_row(float *values, float factor) {
    for (int i = 0; i < PANEL; i++) values[i] *= factor;
}

static void widen_values(const uint16_t *values, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = from_bf16(values[i]);
}

static void narrow_values(const float *values, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) out[i] = to_bf16(values[i]);
}

/* What earlier results shrink by where the largest score so far grows. */
ALWAYS_INLINE float shrinking(float before, float now) {
    return now == before ? 1.0f : before - now < LEAST_EXPONENT ? 0.0f : exponential(before - now);
}
