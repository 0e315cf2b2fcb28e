/* Into the layout and back: plain nf4 has two columns a byte, the first in the high half; plain int8 one. */
#include <string.h>

#include "kernels.h"
#include "layout.h"

/* Whether a line of a row has a scale. */
ALWAYS_INLINE int has_scale(const struct weight *weight, int64_t line) {
    return weight->format == NF4 && line % GROUP_LINES == GROUP_LINES - 1;
}

/* Set rows from first on. Shape of plain codes: (count, row bytes); of plain scales: (count, scales of a row). */
EXPORT void splitrun_pack(const struct weight *weight, int64_t first, int64_t count, const uint8_t *codes,
                          const float *scales) {
    for (int64_t row = first; row < first + count; row++) {
        struct place place = place_of(weight, row);
        for (int64_t line = 0; line < row_bytes(weight) / 4; line++, place.codes += place.stride) {
            if (has_scale(weight, line)) {
                memcpy(place.codes, scales++, 4);
                continue;
            }
            if (weight->format == INT8) {
                memcpy(place.codes, codes, 4);
            } else {
                place.codes[0] = (uint8_t)(codes[0] >> 4 | (codes[2] & 0xf0));
                place.codes[1] = (uint8_t)((codes[0] & 15) | codes[2] << 4);
                place.codes[2] = (uint8_t)(codes[1] >> 4 | (codes[3] & 0xf0));
                place.codes[3] = (uint8_t)((codes[1] & 15) | codes[3] << 4);
            }
            codes += 4;
        }
        if (weight->format == INT8) weight->scales[row] = *scales++;
    }
}

/* Get rows from first on, as splitrun_pack took them. */
EXPORT void splitrun_unpack(const struct weight *weight, int64_t first, int64_t count, uint8_t *codes, float *scales) {
    for (int64_t row = first; row < first + count; row++) {
        struct place place = place_of(weight, row);
        for (int64_t line = 0; line < row_bytes(weight) / 4; line++, place.codes += place.stride) {
            const uint8_t *from = place.codes;
            if (has_scale(weight, line)) {
                memcpy(scales++, from, 4);
                continue;
            }
            if (weight->format == INT8) {
                memcpy(codes, from, 4);
            } else {
                codes[0] = (uint8_t)(from[0] << 4 | (from[1] & 15));
                codes[1] = (uint8_t)(from[2] << 4 | (from[3] & 15));
                codes[2] = (uint8_t)((from[0] & 0xf0) | from[1] >> 4);
                codes[3] = (uint8_t)((from[2] & 0xf0) | from[3] >> 4);
            }
            codes += 4;
        }
        if (weight->format == INT8) *scales++ = weight->scales[row];
    }
}
