/* Attention to bf16 and int8 keys and values on tiles (AMX), for up to 16 heads of a KV group: 16 keys with all heads at a
 * time, then 32 keys with 16 columns. Queries and weights are rounded to bf16, as in attend_dots.h; sums are fp32.
 *
 * Tile registers: 0 to 3 sums, 4 to 7 factors. Keys are the first factor as they lie in memory, and scores come out with a
 * key to each row. Values are the second factor, two keys side by side, in an order of columns that unpacking words gives
 * (see fold_values); results are kept in that order until the end. */
#ifndef SPLITRUN_ATTEND_TILES_H
#define SPLITRUN_ATTEND_TILES_H

#include "tiles.h"

#define TILE_HEADS 16 /* at most */
#define TILE_BYTES 1024
#define PARTS (KEYS_AT_ONCE / TILE)
#define STEP_KEYS 32  /* of a product with values */
#define STEPS (KEYS_AT_ONCE / STEP_KEYS)
#define MOST_COLUMNS 64 /* of values at a time */

/* What the stretches of one call use in turn. */
struct tile_bench {
    _Alignas(64) uint32_t query[MOST_WIDTH / PAIRS][TILE][TILE]; /* line r of a step: columns 2 r and 2 r + 1 of 16 heads */
    _Alignas(64) uint16_t keys[KEYS_AT_ONCE * MOST_WIDTH];       /* where they are not bf16, or too few for a tile */
    _Alignas(64) uint16_t values[STEPS][MOST_COLUMNS / TILE][TILE_BYTES / 2];
    _Alignas(64) float sums[4][TILE][TILE];
    _Alignas(64) float weights[TILE_HEADS][KEYS_AT_ONCE];
    float shrink[TILE_HEADS];
    const uint8_t *upcoming[2], *upcoming_end; /* keys and values of the next stretch that are still to come */
};

/* Let the next lines of the next stretch come to the second cache: keys, then values. The calls are spread over all of a
 * stretch's work, for a processor keeps only some lines on their way. */
ALWAYS_INLINE void fetch_upcoming(struct tile_bench *bench, const int count) {
    for (int i = 0; i < count; i++, bench->upcoming[0] += LINE) __builtin_prefetch(bench->upcoming[0], 0, 2);
    if (bench->upcoming[0] < bench->upcoming_end) return;
    bench->upcoming[0] = bench->upcoming[1];
    bench->upcoming_end = (const uint8_t *)UINTPTR_MAX;
}

ALWAYS_INLINE void lay_query(const float *query, int heads, int width, struct tile_bench *bench) {
    memset(bench->query, 0, (size_t)(width / PAIRS) * TILE_BYTES);
    for (int head = 0; head < heads; head++) {
        uint32_t rounded[MOST_WIDTH / 2];
        store_values(query + head * width, BF16, 0, width, rounded);
        for (int pair = 0; pair < width / 2; pair++) bench->query[pair / TILE][pair % TILE][head] = rounded[pair];
    }
}

/* Where the index-th 16 keys of a stretch lie in bf16. */
ALWAYS_INLINE const uint8_t *key_rows(const struct view *view, const int dtype, const struct stretch *stretch, int index,
                                      struct tile_bench *bench) {
    int64_t first = (stretch->first + index * TILE) * view->width;
    int count = stretch->count - index * TILE;
    if (dtype == BF16 && count >= TILE) return (const uint8_t *)view->keys + 2 * first;
    uint16_t *copy = bench->keys + index * TILE * view->width;
    for (int64_t i = 0; i < TILE * view->width; i += PAIRS)
        _mm512_store_si512(copy + i, i < count * view->width ? thirty_two(view->keys, dtype, first + i) : _mm512_setzero_si512());
    return (const uint8_t *)copy;
}

/* sums[part][key][head] = query . key. */
ALWAYS_INLINE void tile_scores(const struct view *view, const int dtype, const struct stretch *stretch,
                               struct tile_bench *bench) {
    const int ahead = 6 * bytes_of(dtype);
    int64_t stride = 2 * view->width;
    const uint8_t *rows[PARTS];
    int parts = (stretch->count + TILE - 1) / TILE;
    for (int part = 0; part < parts; part++) rows[part] = key_rows(view, dtype, stretch, part, bench);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < view->width / PAIRS; step++) {
        _tile_loadd(7, bench->query[step], LINE);
        _tile_loadd(4, rows[0] + step * LINE, stride);
        _tile_dpbf16ps(0, 4, 7);
        fetch_upcoming(bench, ahead);
        if (parts > 1) {
            _tile_loadd(5, rows[1] + step * LINE, stride);
            _tile_dpbf16ps(1, 5, 7);
            fetch_upcoming(bench, ahead);
        }
        if (parts > 2) {
            _tile_loadd(6, rows[2] + step * LINE, stride);
            _tile_dpbf16ps(2, 6, 7);
            fetch_upcoming(bench, ahead);
        }
        if (parts > 3) {
            _tile_loadd(4, rows[3] + step * LINE, stride);
            _tile_dpbf16ps(3, 4, 7);
            fetch_upcoming(bench, ahead);
        }
    }
    _tile_stored(0, bench->sums[0], LINE);
    _tile_stored(1, bench->sums[1], LINE);
    _tile_stored(2, bench->sums[2], LINE);
    _tile_stored(3, bench->sums[3], LINE);
}

#define EXCHANGED(bit)                                                                                               \
    for (int i = 0; i < 8; i++)                                                                                      \
        if (!(i & bit)) {                                                                                            \
            const integer_lanes at = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};                         \
            integer_lanes other = (at & bit) != 0;                                                                   \
            lanes one = rows[i], two = rows[i + bit];                                                                \
            rows[i] = __builtin_shuffle(one, two, (other & ((at ^ bit) + TILE)) | (~other & at));                    \
            rows[i + bit] = __builtin_shuffle(one, two, (other & (at + TILE)) | (~other & (at | bit)));              \
        }

/* weights[head][key] of eight heads and 16 keys. sums: from the first of the heads on. */
ALWAYS_INLINE void turn_scores(const float *sums, float *weights) {
    lanes rows[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(sums + i * TILE));
        rows[i] = (lanes)_mm512_insertf32x8(low, _mm256_loadu_ps(sums + (i + 8) * TILE), 1);
    }
    EXCHANGED(1)
    EXCHANGED(2)
    EXCHANGED(4)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) store_lanes(weights + i * KEYS_AT_ONCE, rows[i]);
}

/* Two lines of 32 columns of two keys each, from a column on. Words are unpacked within quarters of a register: the first
 * line has columns 0-3, 8-11, 16-19 and 24-27, the second the others. */
ALWAYS_INLINE void fold_values(const struct view *view, const int dtype, const struct stretch *stretch, int key, int column,
                               uint16_t *first, uint16_t *second) {
    int64_t at = (stretch->first + key) * view->width + column;
    __m512i one = _mm512_setzero_si512(), other = one;
    if (key < stretch->count) one = thirty_two(view->values, dtype, at);
    if (key + 1 < stretch->count) other = thirty_two(view->values, dtype, at + view->width);
    _mm512_store_si512(first, _mm512_unpacklo_epi16(one, other));
    _mm512_store_si512(second, _mm512_unpackhi_epi16(one, other));
}

/* out[head] = out[head] * shrink[head] + sum of weight * value, for 32 or 64 columns from one on. */
ALWAYS_INLINE void tile_values(const struct view *view, const int dtype, const struct stretch *stretch, const int columns,
                               int column, struct tile_bench *bench, float *out) {
    const int ahead = 6 * bytes_of(dtype);
    int steps = (stretch->count + STEP_KEYS - 1) / STEP_KEYS;
    for (int key = 0; key < steps * STEP_KEYS; key += 2)
        for (int part = 0; part < columns / TILE; part += 2) {
            uint16_t *line = bench->values[key / STEP_KEYS][part] + key % STEP_KEYS * TILE;
            fold_values(view, dtype, stretch, key, column + part * TILE, line, line + TILE_BYTES / 2);
            if (part == 0) fetch_upcoming(bench, bytes_of(dtype));
        }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; step++) {
        _tile_loadd(4, (const uint16_t *)bench->weights + step * STEP_KEYS, sizeof bench->weights[0]);
        _tile_loadd(5, bench->values[step][0], LINE);
        _tile_dpbf16ps(0, 4, 5);
        fetch_upcoming(bench, ahead);
        _tile_loadd(6, bench->values[step][1], LINE);
        _tile_dpbf16ps(1, 4, 6);
        fetch_upcoming(bench, ahead);
        if (columns == 2 * TILE) continue;
        _tile_loadd(7, bench->values[step][2], LINE);
        _tile_dpbf16ps(2, 4, 7);
        fetch_upcoming(bench, ahead);
        _tile_loadd(5, bench->values[step][3], LINE);
        _tile_dpbf16ps(3, 4, 5);
        fetch_upcoming(bench, ahead);
    }
    _tile_stored(0, bench->sums[0], LINE);
    _tile_stored(1, bench->sums[1], LINE);
    if (columns > 2 * TILE) {
        _tile_stored(2, bench->sums[2], LINE);
        _tile_stored(3, bench->sums[3], LINE);
    }
    for (int head = 0; head < view->heads; head++)
#pragma GCC unroll 4
        for (int part = 0; part < columns / TILE; part++) {
            float *own = out + head * view->width + column + part * TILE;
            store_lanes(own, load_lanes(own) * bench->shrink[head] + load_lanes(bench->sums[part][head]));
        }
}

ALWAYS_INLINE void tile_stretch(const struct view *view, const int dtype, const struct stretch *stretch,
                                struct tile_bench *bench, float *out, float *largest, float *total) {
    float key_scales[KEYS_AT_ONCE] = {0}, value_scales[KEYS_AT_ONCE] = {0};
    if (dtype == INT8_KV) {
        memcpy(key_scales, view->key_scales + stretch->first, sizeof(float) * (size_t)stretch->count);
        memcpy(value_scales, view->value_scales + stretch->first, sizeof(float) * (size_t)stretch->count);
    }
    int64_t upcoming = stretch->upcoming * view->width * bytes_of(dtype);
    bench->upcoming[0] = (const uint8_t *)view->keys + upcoming;
    bench->upcoming[1] = (const uint8_t *)view->values + upcoming;
    bench->upcoming_end = bench->upcoming[0] + KEYS_AT_ONCE * view->width * bytes_of(dtype);
    tile_scores(view, dtype, stretch, bench);
    for (int part = 0; part < PARTS; part++)
        for (int head = 0; head < view->heads; head += 8)
            turn_scores(bench->sums[part][0] + head, bench->weights[head] + part * TILE);
    for (int head = 0; head < view->heads; head++) {
        float *weights = bench->weights[head];
        for (int key = 0; dtype == INT8_KV && key < KEYS_AT_ONCE; key++) weights[key] *= key_scales[key];
        bench->shrink[head] = weigh(weights, stretch->count, largest + head, total + head);
        for (int key = 0; dtype == INT8_KV && key < KEYS_AT_ONCE; key++) weights[key] *= value_scales[key];
        to_bf16_in_place(weights);
    }
    int column = 0;
    for (; column + MOST_COLUMNS <= view->width; column += MOST_COLUMNS)
        tile_values(view, dtype, stretch, MOST_COLUMNS, column, bench, out);
    if (column < view->width) tile_values(view, dtype, stretch, PAIRS, column, bench, out);
}

/* Columns that unpacking has mixed back to where they belong. */
ALWAYS_INLINE void unfold(float *out, int64_t count) {
    for (; count > 0; count -= PAIRS, out += PAIRS) {
        lanes first = load_lanes(out), second = load_lanes(out + LANES);
        const integer_lanes low = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
        store_lanes(out, __builtin_shuffle(first, second, low));
        store_lanes(out + LANES, __builtin_shuffle(first, second, low + 8));
    }
}

ALWAYS_INLINE void attend_on_tiles_as(const struct view *view, const int dtype, const float *query, float *out,
                                      float *largest, float *total) {
    struct tile_bench bench;
    lay_query(query, view->heads, view->width, &bench);
    memset(bench.weights, 0, sizeof bench.weights);
    for (int head = 0; head < view->heads; head++) largest[head] = LEAST_SCORE, total[head] = 0.0f;
    for (int i = 0; i < view->heads * view->width; i++) out[i] = 0.0f;
    _tile_loadconfig(&all_full);
    for (int64_t start = view->first, stop; start < view->last; start = stop) {
        stop = end_of_stretch(view, start);
        int64_t upcoming = slot_of(view, stop < view->end ? stop : start);
        struct stretch stretch = {slot_of(view, start), upcoming, (int)(stop - start)};
        tile_stretch(view, dtype, &stretch, &bench, out, largest, total);
    }
    _tile_release();
    unfold(out, view->heads * view->width);
}

static void attend(const struct view *view, const float *query, float *out, float *largest, float *total) {
    if (view->heads > TILE_HEADS || view->width % PAIRS || (view->dtype != BF16 && view->dtype != INT8_KV))
        attend_by_dots(view, query, out, largest, total);
    else if (view->dtype == BF16)
        attend_on_tiles_as(view, BF16, query, out, largest, total);
    else
        attend_on_tiles_as(view, INT8_KV, query, out, largest, total);
}

#endif
