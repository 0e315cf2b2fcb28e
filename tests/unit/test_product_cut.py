"""How products are cut for a card: every tile is one team's, and no block is more than the registers allow."""

from __future__ import annotations

import pytest

from splitrun.kernels.gpu.direct import GROUP, MOST_WARPS, PIECE, TILE, product_cut
from splitrun.kernels.gpu.matrix import DENSE, INT8, NF4


@pytest.mark.parametrize("format", [DENSE, INT8, NF4])
@pytest.mark.parametrize("processors", [1, 8, 20, 132])
@pytest.mark.parametrize(
    ("outputs", "columns", "gated"),
    [(1, 256, False), (2048, 1536, False), (8960, 1536, True), (1536, 8960, False), (151936, 1536, False)],
)
def test_a_cut_reaches_every_tile_within_its_bounds(
    format: int, processors: int, outputs: int, columns: int, gated: bool
) -> None:
    cut = product_cut(format, outputs, columns, gated, processors)
    tiles = -(-outputs // (TILE // 2 if gated else TILE))
    groups = -(-columns // (PIECE * GROUP[format]))
    assert 1 <= cut.size <= groups
    assert cut.size * cut.teams <= MOST_WARPS[format]
    assert cut.blocks <= processors
    first = {team * cut.blocks + block for team in range(cut.teams) for block in range(cut.blocks)}
    assert first == set(range(cut.teams * cut.blocks)), "teams begin at different tiles"
    assert (cut.teams - 1) * cut.blocks < tiles, "a team with nothing to do"
    rounds = -(-tiles // (cut.teams * cut.blocks))
    even = tiles * groups / (processors * MOST_WARPS[format])
    assert rounds * -(-groups // cut.size) <= 2 * even + 2, "no warp has much more than its share"


def test_a_cut_that_fills_a_card_evenly_is_found() -> None:
    assert product_cut(NF4, 8960, 1536, True, 132).size == 3, "two rounds of two groups, not one of six"
