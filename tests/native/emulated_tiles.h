/* The tile instructions that amx.c uses, in plain C, for processors without them. One thread. */
#ifndef EMULATED_TILES_H
#define EMULATED_TILES_H

#include <stdlib.h>
#include <string.h>

static uint8_t tiles[8][16][64];
static int tiles_configured;

static void emulated_configure(const uint8_t *configuration) {
    if (configuration[0] != 1) abort();
    for (int tile = 0; tile < 8; tile++)
        if (configuration[16 + 2 * tile] != 64 || configuration[17 + 2 * tile] || configuration[48 + tile] != 16) abort();
    tiles_configured = 1;
    memset(tiles, 0x55, sizeof tiles);
}

static void emulated_load(int tile, const void *base, int64_t stride) {
    if (!tiles_configured) abort();
    for (int row = 0; row < 16; row++) memcpy(tiles[tile][row], (const uint8_t *)base + row * stride, 64);
}

static void emulated_store(int tile, void *base, int64_t stride) {
    if (!tiles_configured) abort();
    for (int row = 0; row < 16; row++) memcpy((uint8_t *)base + row * stride, tiles[tile][row], 64);
}

static float emulated_bf16(const uint8_t *bytes) {
    uint32_t bits = (uint32_t)bytes[0] << 16 | (uint32_t)bytes[1] << 24;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void emulated_dot(int sums, int a, int b, int bf16) {
    if (!tiles_configured) abort();
    for (int row = 0; row < 16; row++)
        for (int four = 0; four < 16; four++)
            for (int lane = 0; lane < 16; lane++) {
                const uint8_t *left = tiles[a][row] + four * 4, *right = tiles[b][four] + lane * 4;
                float sum;
                int32_t dot;
                memcpy(&sum, tiles[sums][row] + lane * 4, 4);
                memcpy(&dot, tiles[sums][row] + lane * 4, 4);
                for (int i = 0; bf16 && i < 4; i += 2) sum += emulated_bf16(left + i) * emulated_bf16(right + i);
                for (int i = 0; !bf16 && i < 4; i++) dot += (int8_t)left[i] * (int8_t)right[i];
                if (bf16)
                    memcpy(tiles[sums][row] + lane * 4, &sum, 4);
                else
                    memcpy(tiles[sums][row] + lane * 4, &dot, 4);
            }
}

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(configuration) emulated_configure((const uint8_t *)(configuration))
#define _tile_release() (void)(tiles_configured = 0)
#define _tile_loadd(tile, base, stride) emulated_load(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) emulated_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_store(tile, base, stride)
#define _tile_zero(tile) (void)memset(tiles[tile], 0, sizeof tiles[tile])
#define _tile_dpbf16ps(sums, a, b) emulated_dot(sums, a, b, 1)
#define _tile_dpbssd(sums, a, b) emulated_dot(sums, a, b, 0)

#endif
