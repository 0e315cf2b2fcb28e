"""How a product is cut into blocks, teams of warps and tiles: the matrix's shape and the card alone decide.

Whole numbers; launches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from splitrun.kernels.gpu.matrix import DENSE, INT8, NF4

PIECE, TILE = 64, 16
MOST_WARPS = {DENSE: 24, INT8: 16, NF4: 16}
"""Warps of a block, as the registers allow."""
GROUP = {DENSE: 1, INT8: 2, NF4: 4}
"""Pieces of 64 columns that a warp reads at a time."""
TABLE_BYTES = {DENSE: 0, INT8: 0, NF4: 256 * 32 * 4}
"""The look-up table in shared memory. Every block fills it, so there is no more than one block a multiprocessor."""
MOST_COPIED_BYTES = {DENSE: 25 << 10, INT8: 25 << 10, NF4: 0}
"""Rows of x that take no more than this are copied to shared memory first. With all else that fits the 99 KiB which the
cards of capability 8.6 have."""
TILE_COST = 0.1
"""What the end of a tile takes, in groups of pieces: sums of a team are added and stored."""
ALIKE = 1.02
"""Of cuts that take as long within this, the one with the largest teams: they read neighbouring memory together."""


@dataclass(frozen=True)
class Cut:
    """How a product is cut: warps that share a tile (a team), teams of a block, and blocks."""

    size: int
    teams: int
    blocks: int


def shared_bytes(format: int, warps: int, eights: int) -> int:
    """Shared memory of a block: the table, and each warp's sums for up to 8 or 16 rows, twice. Without a copy of x."""
    return TABLE_BYTES[format] + 2 * warps * TILE * 8 * eights * 4


@cache
def product_cut(format: int, outputs: int, columns: int, gated: bool, processors: int) -> Cut:
    """The cut of a product: the matrix's shape and the card alone decide, so that a row's bits do not depend on the
    step."""
    tiles = -(-outputs // (TILE // 2 if gated else TILE))
    groups = -(-columns // (PIECE * GROUP[format]))
    most = MOST_WARPS[format]

    def turns(size: int) -> float:
        rounds = -(-tiles // (processors * (most // size)))
        return rounds * (-(-groups // size) + TILE_COST)

    sizes = range(1, min(most, groups) + 1)
    least = min(map(turns, sizes))
    size = max(size for size in sizes if turns(size) <= ALIKE * least)
    return Cut(size, min(most // size, -(-tiles // processors)), min(processors, tiles))
