/* Attention of the heads of one KV group over blocks, with the softmax corrected 64 keys at a time. A block's keys are
 * taken together wherever the new tokens begin, so a token's result does not depend on how many were computed with it. */
#ifndef SPLITRUN_ATTEND_H
#define SPLITRUN_ATTEND_H

#include "exponential.h"
#include "lanes.h"

#define MOST_WIDTH 512
#define KEYS_AT_ONCE 64
#define LEAST_SCORE (-3.0e38f)
#define KEY_STRIP 4
#ifndef HEAD_STRIP /* heads at a time whose sums with four keys, or with four parts of a value, fit the registers */
#define HEAD_STRIP 1
#endif

/* How many of the heads that are left go next: about equal shares of at most HEAD_STRIP. */
ALWAYS_INLINE int heads_at_once(int left) {
    int shares = (left + HEAD_STRIP - 1) / HEAD_STRIP;
    return (left + shares - 1) / shares;
}

#if HEAD_STRIP == 6
#define FOR_HEADS(count, call)    \
    switch (count) {              \
        case 1: call(1); break;   \
        case 2: call(2); break;   \
        case 3: call(3); break;   \
        case 4: call(4); break;   \
        case 5: call(5); break;   \
        default: call(6);         \
    }
#else
#define FOR_HEADS(count, call) call(1);
#endif

/* Some heads' queries . up to 4 keys, summed in part: four lanes for each key. */
ALWAYS_INLINE void score_strip(const struct view *view, const int dtype, const int heads, int64_t first, int count,
                               const float *query, lanes *quarters_of) {
    lanes sums[HEAD_STRIP][KEY_STRIP] = {{{0}}};
    for (int i = 0; i < view->width; i += LANES) {
        lanes keys[KEY_STRIP];
#pragma GCC unroll 4
        for (int key = 0; key < KEY_STRIP; key++)
            keys[key] = load_as_lanes(view->keys, dtype, (first + (key < count ? key : 0)) * view->width + i);
#pragma GCC unroll 6
        for (int head = 0; head < heads; head++) {
            lanes part = load_lanes(query + head * view->width + i);
#pragma GCC unroll 4
            for (int key = 0; key < KEY_STRIP; key++) sums[head][key] += part * keys[key];
        }
    }
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++) quarters_of[head * 4] = four_sums(sums[head]);
}

/* scores[head][0..16) = query . key for up to 16 keys of one run of slots; those of missing keys mean nothing. */
ALWAYS_INLINE void score_keys(const struct view *view, const int dtype, int64_t first, int count, const float *query,
                              float scores[][KEYS_AT_ONCE]) {
    const int width = view->width, bytes = dtype == FP32 ? 4 : dtype == INT8_KV ? 1 : 2;
    const uint8_t *next = (const uint8_t *)view->keys + first * width * bytes + LOOK_AHEAD;
    const uint8_t *values = (const uint8_t *)view->values + first * width * bytes;
    float scales[LANES] = {0};
    for (int byte = 0; byte < count * width * bytes; byte += LINE) {
        __builtin_prefetch(next + byte);
        __builtin_prefetch(values + byte);
    }
    if (dtype == INT8_KV) memcpy(scales, view->key_scales + first, sizeof(float) * (size_t)count);
    for (int head = 0, at_once; head < view->heads; head += at_once) {
        lanes quarters_of[HEAD_STRIP][4] = {{{0}}};
        at_once = heads_at_once(view->heads - head);
        for (int key = 0; key < count; key += KEY_STRIP) {
#define SCORE(heads)                                                                                                   \
    score_strip(view, dtype, heads, first + key, count - key, query + head * width, quarters_of[0] + key / KEY_STRIP)
            FOR_HEADS(at_once, SCORE)
#undef SCORE
        }
        for (int own = 0; own < at_once; own++) {
            const lanes *parts = quarters_of[own];
            lanes found = singles(pairs(parts[0], parts[1]), pairs(parts[2], parts[3]));
            store_lanes(scores[head + own], dtype == INT8_KV ? found * load_lanes(scales) : found);
        }
    }
}

/* Scores become weights; what was added before is shrunk to the new largest score. Returns by what factor. */
ALWAYS_INLINE float weigh(float *scores, int count, float *largest, float *total) {
    lanes most = (lanes){0} + *largest, sums = {0};
    float most_of[LANES], before = *largest;
    for (int key = count; key < KEYS_AT_ONCE; key++) scores[key] = LEAST_SCORE;
    for (int key = 0; key < KEYS_AT_ONCE; key += LANES) most = larger(most, load_lanes(scores + key));
    store_lanes(most_of, most);
    for (int i = 0; i < LANES; i++) *largest = most_of[i] > *largest ? most_of[i] : *largest;
    for (int key = 0; key < KEYS_AT_ONCE; key++) scores[key] = exponential(scores[key] - *largest);
    for (int key = count; key < KEYS_AT_ONCE; key++) scores[key] = 0.0f;
    for (int key = 0; key < KEYS_AT_ONCE; key += LANES) sums += load_lanes(scores + key);
    float shrink = exponential(before - *largest);
    *total = *total * shrink + sum_of_lanes(sums);
    return shrink;
}

/* out[head] = out[head] * shrink[head] + sum of weight * value, for some heads and 16 * parts columns. */
ALWAYS_INLINE void add_values(const struct view *view, const int dtype, const int heads, const int parts, int64_t first,
                              int count, const float *shrink, float weights[][KEYS_AT_ONCE], float *out) {
    lanes sums[HEAD_STRIP][4];
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            sums[head][part] = load_lanes(out + head * view->width + part * LANES) * shrink[head];
    for (int key = 0; key < count; key++) {
        lanes values[4];
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            values[part] = load_as_lanes(view->values, dtype, (first + key) * view->width + part * LANES);
#pragma GCC unroll 6
        for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
            for (int part = 0; part < parts; part++) sums[head][part] += values[part] * weights[head][key];
    }
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            store_lanes(out + head * view->width + part * LANES, sums[head][part]);
}

/* The same for all heads. The values begin with the first of those columns. */
ALWAYS_INLINE void add_columns(const struct view *view, const int dtype, const int parts, int64_t first, int count,
                               const float *shrink, float weights[][KEYS_AT_ONCE], float *out) {
    for (int head = 0, at_once; head < view->heads; head += at_once) {
        at_once = heads_at_once(view->heads - head);
#define ADD(heads)                                                                                                     \
    add_values(view, dtype, heads, parts, first, count, shrink + head, weights + head, out + head * view->width)
        FOR_HEADS(at_once, ADD)
#undef ADD
    }
}

ALWAYS_INLINE void attend_to_run(const struct view *view, const int dtype, int64_t first, int count, const float *query,
                                 float *out, float *largest, float *total) {
    float weights[MOST_HEADS][KEYS_AT_ONCE], shrink[MOST_HEADS];
    for (int key = 0; key < count; key += LANES)
        score_keys(view, dtype, first + key, count - key < LANES ? count - key : LANES, query,
                   (float(*)[KEYS_AT_ONCE])(weights[0] + key));
    for (int head = 0; head < view->heads; head++) {
        shrink[head] = weigh(weights[head], count, largest + head, total + head);
        if (dtype == INT8_KV)
            for (int key = 0; key < count; key++) weights[head][key] *= view->value_scales[first + key];
    }
    struct view columns = *view;
    int bytes = dtype == FP32 ? 4 : dtype == INT8_KV ? 1 : 2, start = 0;
    for (; start + 4 * LANES <= view->width; start += 4 * LANES) {
        columns.values = (const uint8_t *)view->values + start * bytes;
        add_columns(&columns, dtype, 4, first, count, shrink, weights, out + start);
    }
    for (; start < view->width; start += LANES) {
        columns.values = (const uint8_t *)view->values + start * bytes;
        add_columns(&columns, dtype, 1, first, count, shrink, weights, out + start);
    }
}

ALWAYS_INLINE void attend_as(const struct view *view, const int dtype, const float *query, float *out, float *largest,
                             float *total) {
    for (int head = 0; head < view->heads; head++) largest[head] = LEAST_SCORE, total[head] = 0.0f;
    for (int i = 0; i < view->heads * view->width; i++) out[i] = 0.0f;
    for (int64_t start = view->first, stop; start < view->last; start = stop) {
        int64_t slot = start % view->block_tokens, end = slot / KEYS_AT_ONCE * KEYS_AT_ONCE + KEYS_AT_ONCE;
        end = end < view->block_tokens ? end : view->block_tokens;
        stop = start - slot + end < view->last ? start - slot + end : view->last;
        int64_t first = view->table[start / view->block_tokens] * view->block_stride + slot;
        attend_to_run(view, dtype, first, (int)(stop - start), query, out, largest, total);
    }
}

static void attend(const struct view *view, const float *query, float *out, float *largest, float *total) {
    switch (view->dtype) {
        case FP32: attend_as(view, FP32, query, out, largest, total); break;
        case BF16: attend_as(view, BF16, query, out, largest, total); break;
        case FP16: attend_as(view, FP16, query, out, largest, total); break;
        default: attend_as(view, INT8_KV, query, out, largest, total);
    }
}

#endif
