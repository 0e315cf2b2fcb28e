/* Where the codes of a panel lie, and where its sums go: plain C, for every file that multiplies panels. */
#ifndef SPLITRUN_PANEL_LINES_H
#define SPLITRUN_PANEL_LINES_H

#include "convert.h"
#include "layout.h"
#include "panels.h"

/* Where columns of a tile lie: in the weight, or, for a last tile of fewer rows, in a copy with zeros for the others. */
struct lines {
    const uint8_t *codes;
    const float *scales; /* of int8: 16 */
    uint8_t copied[SLAB * TILE];
    float copied_scales[TILE];
};

ALWAYS_INLINE int64_t lines_of(const struct weight *weight, int64_t columns) {
    return weight->format == NF4 ? columns / GROUP * GROUP_LINES : columns / 4;
}

ALWAYS_INLINE void find_lines(const struct weight *weight, int64_t tile, int64_t first, int64_t count,
                              struct lines *lines) {
    struct place place = place_of(weight, tile * TILE);
    int64_t lanes = lanes_of(weight, tile);
    lines->codes = place.codes + lines_of(weight, first) * place.stride;
    lines->scales = weight->format == INT8 ? weight->scales + tile * TILE : 0;
    if (lanes == TILE) return;
    memset(lines->copied, 0, (size_t)(lines_of(weight, count) * LINE));
    for (int64_t line = 0; line < lines_of(weight, count); line++)
        memcpy(lines->copied + line * LINE, lines->codes + line * place.stride, (size_t)lanes * 4);
    lines->codes = lines->copied;
    if (weight->format == NF4) return;
    memset(lines->copied_scales, 0, sizeof lines->copied_scales);
    memcpy(lines->copied_scales, lines->scales, (size_t)lanes * sizeof(float));
    lines->scales = lines->copied_scales;
}

/* Lines first to last of a tile, for outputs and columns that do not exist. */
ALWAYS_INLINE void clear_lines(uint8_t *out, int64_t first, int64_t last) {
    if (first < last) memset(out + first * LINE, 0, (size_t)((last - first) * LINE));
}

/* Codes of a panel to values, so many columns a line: `nf4` and `int8` write those of a tile, scales apart for int8. */
ALWAYS_INLINE void expand_values(const struct expansion *expansion, int64_t columns,
                                 void (*nf4)(const uint8_t *, int64_t, uint8_t *),
                                 void (*int8)(const uint8_t *, const float *, int64_t, uint8_t *)) {
    const struct weight *weight = expansion->weight;
    const struct slab *slab = &expansion->slab;
    int64_t count = expansion->count;
    struct lines lines;
    for (int64_t t = 0; t < PANEL_TILES; t++) {
        uint8_t *out = slab->lines + t * TILE_LINES;
        int64_t tile = expansion->panel * PANEL_TILES + t, used = tile * TILE < weight->rows ? count : 0;
        if (used) find_lines(weight, tile, expansion->first, count, &lines);
        if (used && weight->format == NF4) nf4(lines.codes, count, out);
        if (used && weight->format == INT8) int8(lines.codes, lines.scales, count, out);
        clear_lines(out, used / columns, slab->steps * 16);
    }
}

static void store_panel(float *sums, int64_t rows, int64_t count, const float *scales, const float *bias, int dtype,
                        void *out, int64_t first, int64_t stride) {
    for (int64_t row = 0; row < rows; row++, sums += PANEL) {
        for (int i = 0; scales && i < PANEL; i++) sums[i] = sums[i] * scales[i];
        for (int i = 0; bias && i < PANEL; i++) sums[i] = sums[i] + bias[i];
        if (count == PANEL) /* a number that the compiler knows */
            store_values(sums, dtype, first + row * stride, PANEL, out);
        else
            store_values(sums, dtype, first + row * stride, (int)count, out);
    }
}

#endif
