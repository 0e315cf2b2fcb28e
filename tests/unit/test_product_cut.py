"""How products are cut for a card: every tile is one team's, and no block is more than registers and memory allow."""

from __future__ import annotations

import pytest

from splitrun.kernels.gpu.cut import GROUP, MOST_COPIED_BYTES, MOST_WARPS, PIECE, TILE, product_cut, shared_bytes
from splitrun.kernels.gpu.matrix import DENSE, INT8, NF4

FORMATS = (DENSE, INT8, NF4)
BARRIERS = 16


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("processors", [1, 8, 20, 82, 132])
@pytest.mark.parametrize(
    ("outputs", "columns", "gated"),
    [
        *((1, 256, False), (2048, 1536, False), (8960, 1536, True), (1536, 8960, False), (2560, 2560, False)),
        *((3072, 8192, False), (151936, 1536, False), (262144, 5376, False)),
    ],
)
def test_a_cut_reaches_every_tile_within_its_bounds(
    format: int, processors: int, outputs: int, columns: int, gated: bool
) -> None:
    cut = product_cut(format, outputs, columns, gated, processors)
    tiles = -(-outputs // (TILE // 2 if gated else TILE))
    groups = -(-columns // (PIECE * GROUP[format]))
    assert 1 <= cut.size <= groups
    assert 1 <= cut.teams * cut.size <= MOST_WARPS[format]
    assert cut.size == 1 or cut.teams <= BARRIERS
    firsts = [team * cut.blocks + block for team in range(cut.teams) for block in range(cut.blocks)]
    reached = [tile for first in firsts for tile in range(first, tiles, cut.teams * cut.blocks)]
    assert sorted(reached) == list(range(tiles))
    assert cut.blocks == min(processors, tiles), "a multiprocessor with nothing to do"
    most = -(-tiles // (cut.teams * cut.blocks)) * -(-groups // cut.size)
    assert most <= 2 * tiles * groups / (processors * MOST_WARPS[format]) + 2, "a warp with much more than its share"


def test_a_cut_that_fills_a_card_evenly_is_found() -> None:
    assert product_cut(NF4, 8960, 1536, True, 132).size == 3, "two rounds of two groups, not one of six"


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_block_fits_small_cards(format: int) -> None:
    assert shared_bytes(format, MOST_WARPS[format], 2) + MOST_COPIED_BYTES[format] <= 99 << 10
