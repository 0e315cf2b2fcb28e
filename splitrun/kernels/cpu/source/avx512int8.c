/* Products of many rows in int8, x86 with AVX-512 VNNI: four rows with four tiles of outputs at a time. Weights are
 * shifted by 128 to be unsigned, and the activations' offsets take it back. */
#include "panel_body.h"

#define ROWS 4

ALWAYS_INLINE void multiply_rows(const uint8_t *x, const float *x_scales, const int32_t *offsets, const int span,
                                 const struct slab *slab, float *sums, int add) {
    const uint8_t *lines = slab->lines;
    const float *scales = slab->scales;
    if (!add)
        for (int i = 0; i < ROWS * PANEL; i += 16) _mm512_storeu_ps(sums + i, _mm512_setzero_ps());
    for (int64_t start = 0; start < slab->steps; start += span) {
        int64_t stop = start + span < slab->steps ? start + span : slab->steps;
        __m512i dots[ROWS][PANEL_TILES];
        for (int row = 0; row < ROWS; row++)
            for (int tile = 0; tile < PANEL_TILES; tile++) dots[row][tile] = _mm512_set1_epi32(offsets[row]);
        for (int64_t step = start; step < stop; step++, x += STEP_TILE, lines += 16 * LINE) {
#pragma GCC unroll 16
            for (int line = 0; line < 16; line++) {
                __m512i weights[PANEL_TILES];
                for (int tile = 0; tile < PANEL_TILES; tile++)
                    weights[tile] = _mm512_loadu_si512(lines + tile * TILE_LINES + line * LINE);
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; row++) {
                    int32_t four;
                    memcpy(&four, x + row * STEP_BYTES + line * 4, 4);
                    __m512i columns = _mm512_set1_epi32(four);
                    for (int tile = 0; tile < PANEL_TILES; tile++)
                        dots[row][tile] = _mm512_dpbusd_epi32(dots[row][tile], weights[tile], columns);
                }
            }
        }
        for (int tile = 0; tile < PANEL_TILES; tile++) {
            __m512 scale = _mm512_loadu_ps(scales + tile * TILE);
            for (int row = 0; row < ROWS; row++) {
                float *target = sums + row * PANEL + tile * TILE;
                __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[row]));
                __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[row][tile]), factor);
                _mm512_storeu_ps(target, _mm512_add_ps(_mm512_loadu_ps(target), product));
            }
        }
        __asm__ volatile("" ::: "memory"); /* else all the sums are kept on the stack from span to span */
        x_scales += TILE;
        offsets += TILE;
        scales += PANEL;
    }
}

ALWAYS_INLINE void multiply_spans(const int span, const struct packed *packed, int64_t tile, int64_t rows,
                                  const struct slab *slab, float *sums, int add) {
    for (int64_t row = 0; row < rows; row += ROWS) {
        int64_t of = tile + row / TILE, step = of * packed->steps + slab->first;
        int64_t scale = (of * packed->spans + slab->first / span) * TILE + row % TILE;
        multiply_rows(packed->tiles + step * STEP_TILE + row % TILE * STEP_BYTES, packed->scales + scale,
                      packed->offsets + scale, span, slab, sums + row * PANEL, add);
    }
}

static void expand(const struct many *many, const struct expansion *expansion) {
    expand_int8_panel(many, expansion, 1);
}

static void multiply(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                     const struct slab *slab, float *sums, int add, const struct expansion *next) {
    if (many->span == 1)
        multiply_spans(1, packed, tile, rows, slab, sums, add);
    else
        multiply_spans(MOST_SPAN, packed, tile, rows, slab, sums, add);
    if (next) expand(many, next);
}

static int64_t spin(int64_t rounds) {
    __m512i ones = _mm512_set1_epi32(0x01010101), sums[16];
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_si512();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], ones, ones);
        __asm__ volatile("" : "+v"(ones));
    }
    for (int i = 1; i < 16; i++) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
    __asm__ volatile("" ::"v"(sums[0]));
    return 16 * 16 * 8;
}

const struct many many_avx512int8 = {"avx512int8", INT8_PRODUCTS, 1, 0, 0, pack_int8, expand, multiply, store_panel,
                                     spin, 0};
const struct many many_avx512int8_wide = {"avx512int8-wide", INT8_PRODUCTS, MOST_SPAN, 0, 0, pack_int8, expand, multiply,
                                          store_panel, spin, 0};
