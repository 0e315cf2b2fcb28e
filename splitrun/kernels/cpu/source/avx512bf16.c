/* Products of many rows in bf16, x86 with AVX-512 BF16: four rows with four tiles of outputs at a time. */
#include "panel_body.h"
#include "chunk_rows_bf16.h"

#define ROWS 4

ALWAYS_INLINE void multiply_rows(const uint8_t *x, const struct slab *slab, float *sums, int add) {
    const uint8_t *lines = slab->lines;
    __m512 all[ROWS][PANEL_TILES];
    for (int row = 0; row < ROWS; row++)
        for (int tile = 0; tile < PANEL_TILES; tile++) all[row][tile] = _mm512_setzero_ps();
    for (int64_t step = 0; step < slab->steps; step++, x += STEP_TILE, lines += 16 * LINE) {
#pragma GCC unroll 16
        for (int line = 0; line < 16; line++) {
            __m512i weights[PANEL_TILES];
            for (int tile = 0; tile < PANEL_TILES; tile++)
                weights[tile] = _mm512_loadu_si512(lines + tile * TILE_LINES + line * LINE);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                int32_t two;
                memcpy(&two, x + row * STEP_BYTES + line * 4, 4);
                __m512i pair = _mm512_set1_epi32(two);
                for (int tile = 0; tile < PANEL_TILES; tile++)
                    all[row][tile] = _mm512_dpbf16_ps(all[row][tile], (__m512bh)weights[tile], (__m512bh)pair);
            }
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int tile = 0; tile < PANEL_TILES; tile++) {
            float *target = sums + row * PANEL + tile * TILE;
            _mm512_storeu_ps(target, add ? _mm512_add_ps(_mm512_loadu_ps(target), all[row][tile]) : all[row][tile]);
        }
}

static void multiply(const struct many *many, const struct packed *packed, int64_t tile, int64_t rows,
                     const struct slab *slab, float *sums, int add, const struct expansion *next) {
    for (int64_t row = 0; row < rows; row += ROWS) {
        int64_t step = (tile + row / TILE) * packed->steps + slab->first;
        multiply_rows(packed->tiles + step * STEP_TILE + row % TILE * STEP_BYTES, slab, sums + row * PANEL, add);
    }
    if (next) expand_bf16(many, next);
}

static int64_t spin(int64_t rounds) {
    __m512i ones = _mm512_set1_epi32(0x3f803f80);
    __m512 sums[16];
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)ones, (__m512bh)ones);
        __asm__ volatile("" : "+v"(ones));
    }
    for (int i = 1; i < 16; i++) sums[0] = _mm512_add_ps(sums[0], sums[i]);
    __asm__ volatile("" ::"v"(sums[0]));
    return 16 * 16 * 4;
}

const struct many many_avx512bf16 = {"avx512bf16", BF16_PRODUCTS, 1, 0, 0, pack_bf16, expand_bf16, multiply, store_panel,
                                     spin, &chunk_rows};
