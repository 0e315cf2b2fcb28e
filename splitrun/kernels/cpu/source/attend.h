/* Attention of the heads of one KV group over blocks, with the softmax corrected block by block. A block's keys are taken
 * together wherever the new tokens begin, so a token's result does not depend on how many were computed with it. */
#ifndef SPLITRUN_ATTEND_H
#define SPLITRUN_ATTEND_H

#include "exponential.h"

#define LANES 16
#define MOST_WIDTH 512
#define KEYS_AT_ONCE 64

/* Always in 16 partial sums that are then added pairwise: the order is part of the definition. */
ALWAYS_INLINE float dot(const float *a, const float *b, int width) {
    float sums[LANES] = {0};
    for (int start = 0; start < width; start += LANES)
        for (int i = 0; i < LANES; i++) sums[i] += a[start + i] * b[start + i];
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

static void attend(const struct view *view, const float *query, float *out) {
    const int width = view->width, heads = view->heads;
    float largest[MOST_HEADS], total[MOST_HEADS], scores[MOST_HEADS][KEYS_AT_ONCE], one[MOST_WIDTH];
    for (int head = 0; head < heads; head++) largest[head] = -3.0e38f, total[head] = 0.0f;
    for (int i = 0; i < heads * width; i++) out[i] = 0.0f;
    for (int64_t start = view->first, stop; start < view->last; start = stop) {
        int64_t base = view->table[start / view->block_tokens] * view->block_stride;
        int64_t slot = start % view->block_tokens, end = slot / KEYS_AT_ONCE * KEYS_AT_ONCE + KEYS_AT_ONCE;
        end = end < view->block_tokens ? end : view->block_tokens;
        stop = start - slot + end < view->last ? start - slot + end : view->last;
        int count = (int)(stop - start);
        for (int key = 0; key < count; key++) {
            load_values(view->keys, view->dtype, base + (slot + key) * width, width, one);
            for (int head = 0; head < heads; head++) scores[head][key] = dot(query + head * width, one, width);
        }
        for (int head = 0; head < heads; head++) {
            float before = largest[head], sum = 0.0f;
            for (int key = 0; key < count; key++)
                largest[head] = scores[head][key] > largest[head] ? scores[head][key] : largest[head];
            float shrink = exponential(before - largest[head]);
            for (int key = 0; key < count; key++) scores[head][key] = exponential(scores[head][key] - largest[head]);
            for (int key = 0; key < count; key++) sum += scores[head][key];
            total[head] = total[head] * shrink + sum;
            for (int i = 0; i < width; i++) out[head * width + i] *= shrink;
        }
        for (int key = 0; key < count; key++) {
            load_values(view->values, view->dtype, base + (slot + key) * width, width, one);
            for (int head = 0; head < heads; head++)
                for (int i = 0; i < width; i++) out[head * width + i] += scores[head][key] * one[i];
        }
    }
    for (int head = 0; head < heads; head++)
        for (int i = 0; i < width; i++) out[head * width + i] /= total[head];
}

#endif
