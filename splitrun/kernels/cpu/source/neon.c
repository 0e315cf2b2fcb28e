/* 64-bit Arm with the dot product instructions: signed bytes, four rows in each register. */
#include <arm_neon.h>

#include "kernels.h"
#include "attend.h"
#include "dense.h"
#include "values.h"
#include "vectors.h"

ALWAYS_INLINE int8x16_t four_columns(const int8_t *codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

ALWAYS_INLINE void add_group(int32x4_t dots, float32x4_t scale, float *sums) {
    vst1q_f32(sums, vaddq_f32(vld1q_f32(sums), vmulq_f32(vcvtq_f32_s32(dots), scale)));
}

ALWAYS_INLINE void nf4_rows(const int rows, const uint8_t *lines, int64_t columns, const struct activations *x,
                            float *sums) {
    const int8x16_t book = vld1q_s8(nf4_codes);
    const uint8x16_t low_half = vdupq_n_u8(15);
    for (int64_t group = 0; group < columns / GROUP; group++, lines += GROUP_LINES * LINE) {
        const int8_t *codes = x->codes + group * GROUP;
        int32x4_t dots[4][4];
        for (int row = 0; row < rows; row++)
            for (int quarter = 0; quarter < 4; quarter++) dots[row][quarter] = vdupq_n_s32(0);
        for (int line = 0; line < 8; line++) {
            __builtin_prefetch(lines + line * LINE + LOOK_AHEAD);
#pragma GCC unroll 4
            for (int quarter = 0; quarter < 4; quarter++) {
                uint8x16_t both = vld1q_u8(lines + line * LINE + quarter * 16);
                int8x16_t low = vqtbl1q_s8(book, vandq_u8(both, low_half));
                int8x16_t high = vqtbl1q_s8(book, vshrq_n_u8(both, 4));
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const int8_t *eight = codes + row * x->code_stride + line * 8;
                    dots[row][quarter] = vdotq_s32(dots[row][quarter], low, four_columns(eight));
                    dots[row][quarter] = vdotq_s32(dots[row][quarter], high, four_columns(eight + 4));
                }
            }
        }
        for (int row = 0; row < rows; row++)
            for (int quarter = 0; quarter < 4; quarter++) {
                float32x4_t scale = vdupq_n_f32(x->scales[row * x->group_stride + group]);
                scale = vmulq_f32(vreinterpretq_f32_u8(vld1q_u8(lines + 8 * LINE + quarter * 16)), scale);
                add_group(dots[row][quarter], scale, sums + row * TILE + quarter * 4);
            }
    }
}

ALWAYS_INLINE void int8_rows(const int rows, const uint8_t *lines, int64_t columns, const struct activations *x,
                             float *sums) {
    for (int64_t start = 0; start < columns; start += GROUP) {
        const int8_t *codes = x->codes + start;
        int count = columns - start < GROUP ? (int)(columns - start) / 4 : GROUP / 4;
        int32x4_t dots[4][4];
        for (int row = 0; row < rows; row++)
            for (int quarter = 0; quarter < 4; quarter++) dots[row][quarter] = vdupq_n_s32(0);
        for (int line = 0; line < count; line++, lines += LINE) {
            __builtin_prefetch(lines + LOOK_AHEAD);
#pragma GCC unroll 4
            for (int quarter = 0; quarter < 4; quarter++) {
                int8x16_t four = vreinterpretq_s8_u8(vld1q_u8(lines + quarter * 16));
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++)
                    dots[row][quarter] =
                        vdotq_s32(dots[row][quarter], four, four_columns(codes + row * x->code_stride + line * 4));
            }
        }
        for (int row = 0; row < rows; row++)
            for (int quarter = 0; quarter < 4; quarter++) {
                float32x4_t scale = vdupq_n_f32(x->scales[row * x->group_stride + start / GROUP]);
                add_group(dots[row][quarter], scale, sums + row * TILE + quarter * 4);
            }
    }
}

#define MOST_AT_ONCE 4
#include "rows.h"

LEVEL(neon);
