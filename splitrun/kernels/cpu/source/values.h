/* Values of one row, for every level: each file that includes this compiles it with its own instruction set. */
#ifndef SPLITRUN_VALUES_H
#define SPLITRUN_VALUES_H

#include "convert.h"

#ifndef OWN_EXPAND
/* Eight lines, 4 bytes of each -> 64 values in the order of the columns. */
ALWAYS_INLINE void nf4_expand(const uint8_t *codes, int64_t stride, float scale, float *values) {
    for (int line = 0; line < 8; line++)
        for (int i = 0; i < 4; i++) {
            values[line * 8 + i] = nf4_table[codes[line * stride + i] & 15] * scale;
            values[line * 8 + 4 + i] = nf4_table[codes[line * stride + i] >> 4] * scale;
        }
}

/* Four lines, 4 bytes of each -> 16 values. */
ALWAYS_INLINE void int8_expand(const uint8_t *codes, int64_t stride, float scale, float *values) {
    for (int line = 0; line < 4; line++)
        for (int i = 0; i < 4; i++) values[line * 4 + i] = (float)(int8_t)codes[line * stride + i] * scale;
}
#endif

static void nf4_row(const uint8_t *codes, int64_t stride, float unused, int64_t columns, int dtype, void *out) {
    (void)unused;
    for (int64_t start = 0; start < columns; start += GROUP, codes += GROUP_LINES * stride) {
        float values[GROUP], scale;
        memcpy(&scale, codes + 8 * stride, 4);
        nf4_expand(codes, stride, scale, values);
        store_values(values, dtype, start, GROUP, out);
    }
}

static void int8_row(const uint8_t *codes, int64_t stride, float scale, int64_t columns, int dtype, void *out) {
    int64_t start = 0;
    for (; start + GROUP <= columns; start += GROUP, codes += 16 * stride) {
        float values[GROUP];
        for (int part = 0; part < 4; part++)
            int8_expand(codes + part * 4 * stride, stride, scale, values + part * 16);
        store_values(values, dtype, start, GROUP, out);
    }
    for (; start < columns; start += 4, codes += stride) {
        float values[4];
        for (int i = 0; i < 4; i++) values[i] = (float)(int8_t)codes[i] * scale;
        store_values(values, dtype, start, 4, out);
    }
}

#endif
