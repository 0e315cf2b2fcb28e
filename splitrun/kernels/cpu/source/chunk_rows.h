/* What a prompt needs beside products, row by row, for the files that multiply bf16 panels: plain C for their compiler to
 * vectorise. */
#include "exponential.h"

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
            lanes gate = load_lanes(gates + i);
            store_lanes(gates + i, gate / (1.0f + exponentials(-gate)) * load_lanes(ups + i));
        }
        memcpy(target, gates, (size_t)count * sizeof(float));
    }
}

/* A row's scores of 64 keys, of which first to last are seen, to weights in bf16; updates the largest and the sum so far
 * and returns what earlier results shrink by. */
static float weigh(float *scores, int first, int last, float *largest, float *total, uint16_t *weights) {
    float before = *largest, most = before, sum = 0.0f, sums[16] = {0};
    for (int i = 0; i < KEYS; i++) {
        scores[i] = i >= first && i < last ? scores[i] : -__builtin_inff();
        most = scores[i] > most ? scores[i] : most;
    }
    for (int i = 0; i < KEYS; i += LANES) store_lanes(scores + i, exponentials(load_lanes(scores + i) - most));
    for (int i = 0; i < KEYS; i++) scores[i] = i >= first && i < last ? scores[i] : 0.0f;
    for (int i = 0; i < KEYS; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += scores[i + lane];
    for (int lane = 0; lane < 16; lane++) sum += sums[lane];
    store_values(scores, BF16, 0, KEYS, weights);
    float shrink = exponential(before - most);
    *largest = most;
    *total = *total * shrink + sum;
    return shrink;
}

/* Keys of a block as lines of a panel; pair p of key i at p * ROW + i * 4. */
static void lay_keys(const uint16_t *const *keys, int count, int width, uint8_t *lines) {
    for (int i = 0; i < KEYS; i++)
        for (int pair = 0; pair < (width + 31) / 32 * 16; pair++) {
            uint32_t two = 0;
            if (i < count && pair * 2 < width) memcpy(&two, keys[i] + pair * 2, 4);
            memcpy(lines + pair * ROW + i * 4, &two, 4);
        }
}

/* 64 columns of values as lines of a panel: keys in pairs. */
static void lay_values(const uint16_t *const *values, int count, int columns, uint8_t *lines) {
    for (int pair = 0; pair < KEYS / 2; pair++) {
        uint32_t out[PANEL] = {0};
        const uint16_t *even = 2 * pair < count ? values[2 * pair] : 0, *odd = 2 * pair + 1 < count ? values[2 * pair + 1] : 0;
        for (int i = 0; even && i < columns; i++) out[i] = even[i];
        for (int i = 0; odd && i < columns; i++) out[i] |= (uint32_t)odd[i] << 16;
        memcpy(lines + pair * ROW, out, sizeof out);
    }
}

static void scale_row(float *values, float factor) {
    for (int i = 0; i < PANEL; i++) values[i] *= factor;
}

static const struct chunk_rows chunk_rows = {norm_row, turn_head, add_panel, gate_panel, weigh, lay_keys, lay_values,
                                             scale_row};
