/* Any processor: plain C, and the definition that the other levels are compared with. */
#include "kernels.h"
#include "attend.h"
#include "dense.h"
#include "values.h"
#include "vectors.h"

static void add_group(const int32_t *sums, const uint8_t *scales, float activation_scale, float *out) {
    for (int lane = 0; lane < TILE; lane++) {
        float scale = 1.0f;
        if (scales) memcpy(&scale, scales + lane * 4, 4);
        scale = scale * activation_scale;
        out[lane] = out[lane] + (float)sums[lane] * scale;
    }
}

static void nf4_tile(const uint8_t *lines, int64_t columns, const struct activations *x, int rows, float *sums) {
    for (int64_t group = 0; group < columns / GROUP; group++, lines += GROUP_LINES * LINE)
        for (int row = 0; row < rows; row++) {
            const int8_t *codes = x->codes + row * x->code_stride + group * GROUP;
            int32_t dots[TILE] = {0};
            for (int line = 0; line < 8; line++)
                for (int lane = 0; lane < TILE; lane++)
                    for (int i = 0; i < 4; i++) {
                        uint8_t both = lines[line * LINE + lane * 4 + i];
                        dots[lane] += nf4_codes[both & 15] * codes[line * 8 + i];
                        dots[lane] += nf4_codes[both >> 4] * codes[line * 8 + 4 + i];
                    }
            add_group(dots, lines + 8 * LINE, x->scales[row * x->group_stride + group], sums + row * TILE);
        }
}

static void int8_tile(const uint8_t *lines, int64_t columns, const struct activations *x, int rows, float *sums) {
    for (int64_t start = 0; start < columns; start += GROUP)
        for (int row = 0; row < rows; row++) {
            const int8_t *codes = x->codes + row * x->code_stride + start;
            int count = columns - start < GROUP ? (int)(columns - start) / 4 : GROUP / 4;
            int32_t dots[TILE] = {0};
            for (int line = 0; line < count; line++)
                for (int lane = 0; lane < TILE; lane++)
                    for (int i = 0; i < 4; i++)
                        dots[lane] += (int8_t)lines[(start / 4 + line) * LINE + lane * 4 + i] * codes[line * 4 + i];
            add_group(dots, 0, x->scales[row * x->group_stride + start / GROUP], sums + row * TILE);
        }
}

LEVEL(portable);
