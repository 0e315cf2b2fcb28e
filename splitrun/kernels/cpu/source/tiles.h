/* Tile registers (AMX), each of 16 rows of 64 bytes, and whether this process may use them. */
#ifndef SPLITRUN_TILES_H
#define SPLITRUN_TILES_H

#include <immintrin.h>

#include "kernels.h"
#ifdef SPLITRUN_EMULATED_TILES
#include SPLITRUN_EMULATED_TILES /* for tests: the same instructions in plain C */
#endif

struct configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* A constant, because compilers believe that the instruction reads only its first bytes. */
static const _Alignas(64) struct configuration all_full = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#endif
