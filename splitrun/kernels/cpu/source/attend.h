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

ALWAYS_INLINE int bytes_of(const int dtype) { return dtype == FP32 ? 4 : dtype == INT8_KV ? 1 : 2; }

/* Let the line come that begins with the index-th value, if one does: to the second cache, for a stretch of keys and
 * values fills the first. */
ALWAYS_INLINE void fetch(const void *values, const int dtype, int64_t index) {
    if (index * bytes_of(dtype) % LINE == 0) __builtin_prefetch((const uint8_t *)values + index * bytes_of(dtype), 0, 2);
}

/* Slots of one block that are read together, and the first of those that follow. */
struct stretch {
    int64_t first, upcoming;
    int count;
};

#ifdef __AVX512BF16__
#include "attend_dots.h"
#endif

/* Some heads' queries . up to 4 keys, summed in part: four lanes for each key. */
ALWAYS_INLINE void score_strip(const struct view *view, const int dtype, const int heads, const struct stretch *stretch,
                               int start, const float *query, lanes *quarters_of) {
    int64_t first = (stretch->first + start) * view->width, upcoming = (stretch->upcoming + start) * view->width;
    lanes sums[HEAD_STRIP][KEY_STRIP] = {{{0}}};
    for (int i = 0; i < view->width; i += LANES) {
        lanes keys[KEY_STRIP];
#pragma GCC unroll 4
        for (int key = 0; key < KEY_STRIP; key++) {
            int there = start + key < stretch->count ? key : 0;
            keys[key] = load_as_lanes(view->keys, dtype, first + there * view->width + i);
            fetch(view->keys, dtype, upcoming + key * view->width + i);
        }
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

/* scores[head][0..16) = query . key for 16 keys of a stretch; those of missing keys mean nothing. */
ALWAYS_INLINE void score_keys(const struct view *view, const int dtype, const int dots, const struct stretch *stretch,
                              int start, const void *query, float scores[][KEYS_AT_ONCE]) {
    const int width = view->width, count = stretch->count - start < LANES ? stretch->count - start : LANES;
    float scales[LANES] = {0};
    if (dtype == INT8_KV) memcpy(scales, view->key_scales + stretch->first + start, sizeof(float) * (size_t)count);
    for (int head = 0, at_once; head < view->heads; head += at_once) {
        lanes quarters_of[HEAD_STRIP][4] = {{{0}}};
        at_once = heads_at_once(view->heads - head);
        for (int key = 0; key < count; key += KEY_STRIP) {
#define SCORE(heads) \
    score_strip(view, dtype, heads, stretch, start + key, (const float *)query + head * width, quarters_of[0] + key / KEY_STRIP)
#define DOTS(heads) \
    dot_strip(view, dtype, heads, stretch, start + key, (const uint16_t *)query + head * width, quarters_of[0] + key / KEY_STRIP)
#ifdef __AVX512BF16__
            if (dots) {
                FOR_HEADS(at_once, DOTS)
            } else
#endif
                FOR_HEADS(at_once, SCORE)
#undef SCORE
#undef DOTS
        }
        for (int own = 0; own < at_once; own++) {
            const lanes *parts = quarters_of[own];
            lanes found = singles(pairs(parts[0], parts[1]), pairs(parts[2], parts[3]));
            store_lanes(scores[head + own] + start, dtype == INT8_KV ? found * load_lanes(scales) : found);
        }
    }
    (void)dots;
}

/* Scores become weights; what was added before is shrunk to the new largest score. Returns by what factor. */
ALWAYS_INLINE float weigh(float *scores, int count, float *largest, float *total) {
    lanes most = (lanes){0} + *largest, sums = {0};
    float most_of[LANES], before = *largest;
    for (int key = count; key < KEYS_AT_ONCE; key++) scores[key] = LEAST_SCORE;
    for (int key = 0; key < KEYS_AT_ONCE; key += LANES) most = larger(most, load_lanes(scores + key));
    store_lanes(most_of, most);
    for (int i = 0; i < LANES; i++) *largest = most_of[i] > *largest ? most_of[i] : *largest;
    for (int key = 0; key < KEYS_AT_ONCE; key += LANES)
        store_lanes(scores + key, exponentials(load_lanes(scores + key) - *largest));
    for (int key = count; key < KEYS_AT_ONCE; key++) scores[key] = 0.0f;
    for (int key = 0; key < KEYS_AT_ONCE; key += LANES) sums += load_lanes(scores + key);
    float shrink = exponential(before - *largest);
    *total = *total * shrink + sum_of_lanes(sums);
    return shrink;
}

/* out[head] = out[head] * shrink[head] + sum of weight * value, for some heads and 16 * parts columns from a column on. */
ALWAYS_INLINE void add_values(const struct view *view, const int dtype, const int heads, const int parts,
                              const struct stretch *stretch, int column, const float *shrink,
                              float weights[][KEYS_AT_ONCE], float *out) {
    int64_t first = stretch->first * view->width + column, upcoming = stretch->upcoming * view->width + column;
    lanes sums[HEAD_STRIP][4];
#pragma GCC unroll 6
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            sums[head][part] = load_lanes(out + head * view->width + part * LANES) * shrink[head];
    for (int key = 0; key < stretch->count; key++) {
        lanes values[4];
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            values[part] = load_as_lanes(view->values, dtype, first + key * view->width + part * LANES);
            fetch(view->values, dtype, upcoming + key * view->width + part * LANES);
        }
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

/* The same for all heads; with dots the weights are bf16. */
ALWAYS_INLINE void add_columns(const struct view *view, const int dtype, const int dots, const int parts,
                               const struct stretch *stretch, int column, const float *shrink,
                               float weights[][KEYS_AT_ONCE], float *out) {
    for (int head = 0, at_once; head < view->heads; head += at_once) {
        at_once = heads_at_once(view->heads - head);
        float *own = out + head * view->width + column;
#define ADD(heads) add_values(view, dtype, heads, parts, stretch, column, shrink + head, weights + head, own)
#define DOTS(heads) dot_values(view, dtype, heads, parts, stretch, column, shrink + head, weights + head, own)
#ifdef __AVX512BF16__
        if (dots) {
            FOR_HEADS(at_once, DOTS)
        } else
#endif
            FOR_HEADS(at_once, ADD)
#undef ADD
#undef DOTS
    }
    (void)dots;
}

ALWAYS_INLINE void attend_to_stretch(const struct view *view, const int dtype, const int dots,
                                     const struct stretch *stretch, const void *query, float *out, float *largest,
                                     float *total) {
    float weights[MOST_HEADS][KEYS_AT_ONCE], shrink[MOST_HEADS];
    int start = 0;
    for (int key = 0; key < stretch->count; key += LANES) score_keys(view, dtype, dots, stretch, key, query, weights);
    for (int head = 0; head < view->heads; head++) {
        shrink[head] = weigh(weights[head], stretch->count, largest + head, total + head);
        if (dtype == INT8_KV)
            for (int key = 0; key < stretch->count; key++)
                weights[head][key] *= view->value_scales[stretch->first + key];
    }
#ifdef __AVX512BF16__
    for (int head = 0; dots && head < view->heads; head++) to_bf16_in_place(weights[head]);
#endif
    for (; start + 4 * LANES <= view->width; start += 4 * LANES)
        add_columns(view, dtype, dots, 4, stretch, start, shrink, weights, out);
    if (dots && start < view->width) {
        add_columns(view, dtype, dots, 2, stretch, start, shrink, weights, out);
        return;
    }
    for (; start < view->width; start += LANES)
        add_columns(view, dtype, dots, 1, stretch, start, shrink, weights, out);
}

/* The slots from a place in the table's blocks on: up to 64, of one block, wherever the first key stands. */
ALWAYS_INLINE int64_t end_of_stretch(const struct view *view, int64_t start) {
    int64_t slot = start % view->block_tokens, end = slot / KEYS_AT_ONCE * KEYS_AT_ONCE + KEYS_AT_ONCE;
    end = start - slot + (end < view->block_tokens ? end : view->block_tokens);
    return end < view->last ? end : view->last;
}

ALWAYS_INLINE int64_t slot_of(const struct view *view, int64_t place) {
    return view->table[place / view->block_tokens] * view->block_stride + place % view->block_tokens;
}

ALWAYS_INLINE void attend_as(const struct view *view, const int dtype, const int dots, const void *query, float *out,
                             float *largest, float *total) {
    for (int head = 0; head < view->heads; head++) largest[head] = LEAST_SCORE, total[head] = 0.0f;
    for (int i = 0; i < view->heads * view->width; i++) out[i] = 0.0f;
    for (int64_t start = view->first, stop; start < view->last; start = stop) {
        stop = end_of_stretch(view, start);
        int64_t upcoming = slot_of(view, stop < view->end ? stop : start);
        struct stretch stretch = {slot_of(view, start), upcoming, (int)(stop - start)};
        attend_to_stretch(view, dtype, dots, &stretch, query, out, largest, total);
    }
}

#ifdef OWN_ATTEND /* the including file has one, and uses this for what that does not take */
#define attend attend_by_dots
#endif
static void attend(const struct view *view, const float *query, float *out, float *largest, float *total) {
#ifdef __AVX512BF16__
    if ((view->dtype == BF16 || view->dtype == INT8_KV) && view->width % PAIRS == 0) {
        uint16_t rounded[MOST_HEADS * MOST_WIDTH];
        store_values(query, BF16, 0, view->heads * view->width, rounded);
        if (view->dtype == BF16)
            attend_as(view, BF16, 1, rounded, out, largest, total);
        else
            attend_as(view, INT8_KV, 1, rounded, out, largest, total);
        return;
    }
#endif
    switch (view->dtype) {
        case FP32: attend_as(view, FP32, 0, query, out, largest, total); break;
        case BF16: attend_as(view, BF16, 0, query, out, largest, total); break;
        case FP16: attend_as(view, FP16, 0, query, out, largest, total); break;
        default: attend_as(view, INT8_KV, 0, query, out, largest, total);
    }
}
#undef attend

#endif
