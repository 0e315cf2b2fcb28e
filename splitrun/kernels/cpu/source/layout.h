/* Where a matrix row lies in the layout that kernels.h describes. */
#ifndef SPLITRUN_LAYOUT_H
#define SPLITRUN_LAYOUT_H

#include "kernels.h"

#define TILES 4 /* of a task: as many rows as the columns of a group */

struct place {
    uint8_t *codes; /* of the row's first line */
    int64_t stride; /* to its next */
};

ALWAYS_INLINE int64_t lanes_of(const struct weight *weight, int64_t tile) {
    int64_t left = weight->rows - tile * TILE;
    return left < TILE ? left : TILE;
}

ALWAYS_INLINE int64_t row_bytes(const struct weight *weight) {
    if (weight->format == NF4) return weight->columns / GROUP * GROUP_LINES * 4;
    return weight->columns * (weight->format == INT8 ? 1 : 2);
}

ALWAYS_INLINE struct place place_of(const struct weight *weight, int64_t row) {
    int64_t tile = row / TILE, lane = row % TILE, lanes = lanes_of(weight, tile);
    struct place place = {weight->codes + tile * TILE * row_bytes(weight) + lane * 4, lanes * 4};
    return place;
}

ALWAYS_INLINE int64_t tiles_of(const struct weight *weight) { return (weight->rows + TILE - 1) / TILE; }
ALWAYS_INLINE int64_t tasks_of(int64_t tiles) { return (tiles + TILES - 1) / TILES; }

#endif
