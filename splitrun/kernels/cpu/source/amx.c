/* Products of many rows on tiles (AMX): 32 rows with 32 outputs at a time, in bf16 and in int8.
 *
 * Tile registers: 0 to 3 sums, 4 and 5 activations, 6 and 7 weights. Each row of sums is 16 outputs. */
#include "panel_body.h"
#include "chunk_rows_bf16.h"
#include "tiles.h"

#define HALF 32                /* outputs at a time, of a panel */
#define ROWS 32                /* at a time */
#define SUMS (TILE * TILE)     /* of a tile */
#define STRIDE (PANEL * 4)     /* bytes between rows of sums */

static void enter(void) { _tile_loadconfig(&all_full); }

static void leave(void) { _tile_release(); }

ALWAYS_INLINE void clear_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* The four tiles of sums to memory, bytes `beside` and `below` the first; the lower two only where there are rows. */
ALWAYS_INLINE void store_sums(void *sums, int64_t beside, int64_t below, int64_t stride, int lower) {
    uint8_t *first = sums;
    _tile_stored(0, first, stride);
    _tile_stored(1, first + beside, stride);
    if (lower) _tile_stored(2, first + below, stride);
    if (lower) _tile_stored(3, first + below + beside, stride);
}

/* An expansion that goes on line by line between the instructions on tiles: those wait for memory most of the time. */
struct unpacking {
    const uint8_t *codes;
    uint8_t *out;
    int64_t lines, left, tiles; /* of a tile; left of it; tiles left */
    int64_t skip, ahead, each;  /* bytes from the end of a tile's lines to the next tile's; see expansion; lines each time */
};

/* Whether it can go on so: nf4, of four whole tiles. What cannot is to be expanded at once. */
ALWAYS_INLINE int starts(struct unpacking *unpacking, const struct expansion *next, int64_t times) {
    unpacking->left = 0;
    if (!next || next->weight->format != NF4 || (next->panel + 1) * PANEL > next->weight->rows) return 0;
    struct place place = place_of(next->weight, next->panel * PANEL);
    int64_t lines = next->count / 8, tile = lines_of(next->weight, next->count) * LINE;
    struct unpacking started = {place.codes + lines_of(next->weight, next->first) * LINE, next->slab.lines, lines, lines,
                                PANEL_TILES, TILE * row_bytes(next->weight) - tile, next->ahead,
                                parts(lines * PANEL_TILES, times)};
    *unpacking = started;
    return 1;
}

ALWAYS_INLINE void unpack_bf16(struct unpacking *unpacking, int64_t count) {
    const __m512 table = _mm512_loadu_ps(nf4_table);
    for (; count > 0 && unpacking->left; count--) {
        const uint8_t *codes = unpacking->codes, *scales = codes + (((unpacking->left - 1) & 7) + 1) * LINE;
        nf4_line_to_bf16(codes, table, _mm512_loadu_ps(scales), unpacking->out);
        __builtin_prefetch(codes + unpacking->ahead, 0, 2);
        unpacking->codes += LINE;
        unpacking->out += 4 * LINE;
        if (--unpacking->left & 7) continue;
        __builtin_prefetch(scales + unpacking->ahead, 0, 2);
        unpacking->codes += LINE;
        if (unpacking->left || !--unpacking->tiles) continue;
        unpacking->codes += unpacking->skip;
        unpacking->out += TILE_LINES - 4 * LINE * unpacking->lines;
        unpacking->left = unpacking->lines;
    }
}

/* One or two tiles of rows (the second is null for one) with two of outputs. */
ALWAYS_INLINE void bf16_square(const uint8_t *first, const uint8_t *second, const uint8_t *lines, int64_t steps,
                               float *sums, int add, struct unpacking *unpacking) {
    if (add) {
        const float *lower = sums + TILE * PANEL;
        _tile_loadd(0, sums, STRIDE);
        _tile_loadd(1, sums + TILE, STRIDE);
        if (second) _tile_loadd(2, lower, STRIDE);
        if (second) _tile_loadd(3, lower + TILE, STRIDE);
    } else {
        clear_sums();
    }
    for (int64_t step = 0; step < steps; step++, lines += 16 * LINE) {
        _tile_stream_loadd(4, first + step * STEP_TILE, STEP_BYTES);
        _tile_loadd(6, lines, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, lines + TILE_LINES, LINE);
        _tile_dpbf16ps(1, 4, 7);
        unpack_bf16(unpacking, unpacking->each);
        if (second) {
            _tile_stream_loadd(5, second + step * STEP_TILE, STEP_BYTES);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_sums(sums, LINE, TILE * STRIDE, STRIDE, second != 0);
}

static void multiply_bf16(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                          const struct slab *slab, float *sums, int add, const struct expansion *next) {
    struct unpacking unpacking = {0};
    int started = starts(&unpacking, next, PANEL / HALF * parts(rows, ROWS) * slab->steps);
    for (int64_t half = 0; half < PANEL; half += HALF)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint8_t *first = packed->tiles + ((tile + row / TILE) * packed->steps + slab->first) * STEP_TILE;
            const uint8_t *second = first + packed->steps * STEP_TILE, *lines = slab->lines + half / TILE * TILE_LINES;
            if (rows - row > TILE)
                bf16_square(first, second, lines, slab->steps, sums + row * PANEL + half, add, &unpacking);
            else
                bf16_square(first, 0, lines, slab->steps, sums + row * PANEL + half, add, &unpacking);
        }
    unpack_bf16(&unpacking, unpacking.left + unpacking.tiles * unpacking.lines);
    if (next && !started) expand_bf16(many, next);
}

/* Integer sums that wait to be scaled and added, row by row, between the next instructions on tiles. */
struct pending {
    const int32_t *dots; /* Shape: (tiles of rows, 2, 16, 16) */
    const float *x_scales, *scales;
    int64_t x_stride; /* between tiles of rows */
    float *sums;
    int next, rows, add;
};

ALWAYS_INLINE void settle(struct pending *pending, int count) {
    for (; count > 0 && pending->next < pending->rows; count--, pending->next++) {
        int tile = pending->next / TILE, row = pending->next % TILE;
        const int32_t *dots = pending->dots + tile * 2 * SUMS + row * TILE;
        __m512 x_scale = _mm512_set1_ps(pending->x_scales[tile * pending->x_stride + row]);
        float *target = pending->sums + pending->next * PANEL;
        for (int i = 0; i < 2; i++) {
            __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(pending->scales + i * TILE), x_scale);
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(dots + i * SUMS)), factor);
            __m512 before = pending->add ? _mm512_loadu_ps(target + i * TILE) : _mm512_setzero_ps();
            _mm512_storeu_ps(target + i * TILE, _mm512_add_ps(before, product));
        }
    }
}

ALWAYS_INLINE void int8_square(const uint8_t *first, const uint8_t *second, const uint8_t *lines, int64_t steps,
                               int32_t *dots, struct pending *pending) {
    int each = (int)parts(pending->rows, steps);
    clear_sums();
    for (int64_t step = 0; step < steps; step++, lines += 16 * LINE) {
        _tile_stream_loadd(4, first + step * STEP_TILE, STEP_BYTES);
        _tile_loadd(6, lines, LINE);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, lines + TILE_LINES, LINE);
        _tile_dpbssd(1, 4, 7);
        settle(pending, each);
        if (second) {
            _tile_stream_loadd(5, second + step * STEP_TILE, STEP_BYTES);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    settle(pending, ROWS);
    store_sums(dots, SUMS * 4, SUMS * 8, STEP_BYTES, second != 0);
}

static void expand_int8(const struct many *many, const struct expansion *expansion) {
    expand_int8_panel(many, expansion, 0);
}

/* A slab is one span here. */
static void multiply_int8(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                          const struct slab *slab, float *sums, int add, const struct expansion *next) {
    _Alignas(64) int32_t dots[2][4 * SUMS];
    struct pending pending = {.rows = 0};
    int turn = 0;
    for (int64_t half = 0; half < PANEL; half += HALF)
        for (int64_t row = 0; row < rows; row += ROWS, turn ^= 1) {
            int64_t of = tile + row / TILE;
            const uint8_t *first = packed->tiles + (of * packed->steps + slab->first) * STEP_TILE;
            const uint8_t *second = first + packed->steps * STEP_TILE, *lines = slab->lines + half / TILE * TILE_LINES;
            int both = rows - row > TILE;
            if (both)
                int8_square(first, second, lines, slab->steps, dots[turn], &pending);
            else
                int8_square(first, 0, lines, slab->steps, dots[turn], &pending);
            struct pending next = {dots[turn],
                                   packed->scales + (of * packed->spans + slab->first / many->span) * TILE,
                                   slab->scales + half, packed->spans * TILE, sums + row * PANEL + half, 0,
                                   both ? ROWS : TILE, add};
            pending = next;
        }
    settle(&pending, ROWS);
    if (next) expand_int8(many, next);
}

static int64_t spin_bf16(int64_t rounds) {
    for (int64_t round = 0; round < rounds; round++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return 4 * 2 * TILE * TILE * 32;
}

static int64_t spin_int8(int64_t rounds) {
    for (int64_t round = 0; round < rounds; round++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    return 4 * 2 * TILE * TILE * 64;
}

const struct many many_amx_bf16 = {"amx-bf16", BF16_PRODUCTS, 1, enter, leave, pack_bf16, expand_bf16, multiply_bf16,
                                   store_panel, spin_bf16, &chunk_rows};
const struct many many_amx_int8 = {"amx-int8", INT8_PRODUCTS, MOST_SPAN, enter, leave, pack_int8, expand_int8,
                                   multiply_int8, store_panel, spin_int8, 0};
