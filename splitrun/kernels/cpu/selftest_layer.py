"""Whether a level runs a decoder layer as plain torch does, on this machine: norms, rotary, attention over blocks, MLP.

The weights are 16-bit floats, whose products are exact but for rounding, so the bound is tight. Knows no models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from splitrun.kernels.cpu.block import BlockKernel, LayerChain, LayerParts, RowHistories
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.library import Kernel

HIDDEN, INNER, WIDTH, HEADS, KV_HEADS, BLOCK_TOKENS = 96, 80, 32, 6, 2, 24
PAST = 531
"""More than a segment, and a multiple of nothing."""
BOUND = 0.01


def layer_fault(kernel: Kernel) -> str | None:
    """Why the layer kernel is not to be trusted, None when it is."""
    generator = torch.Generator().manual_seed(9)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heights = {"query": HEADS * WIDTH, "key": KV_HEADS * WIDTH, "value": KV_HEADS * WIDTH, "output": HIDDEN}
    heights |= {"gate": INNER, "up": INNER, "down": HIDDEN}
    columns = {"output": HEADS * WIDTH, "down": INNER}
    matrices = {
        name: (noise(rows, columns.get(name, HIDDEN)) * columns.get(name, HIDDEN) ** -0.5).bfloat16()
        for name, rows in heights.items()
    }
    norms = {name: (1 + 0.1 * noise(HIDDEN)).bfloat16() for name in ("first_norm", "second_norm")}
    blocks = PAST // BLOCK_TOKENS + 1
    keys, values = (noise(blocks, KV_HEADS, BLOCK_TOKENS, WIDTH).bfloat16() for _ in range(2))
    x, angles = noise(1, HIDDEN).bfloat16(), noise(1, WIDTH // 2).repeat(1, 2)
    cosines, sines = angles.cos().bfloat16(), angles.sin().bfloat16()
    expected = _layer(x, matrices, norms, (keys, values), (cosines, sines))
    weights = {name: DenseWeight(matrix, kernel) for name, matrix in matrices.items()}
    parts = LayerParts(weights, norms, keys, values, None, 1e-6, WIDTH**-0.5)
    rows = RowHistories([list(range(blocks))], [0], [PAST], 1)
    found = LayerChain([BlockKernel(parts, kernel)]).run(x, cosines, sines, [rows])
    error = (found.float() - expected).norm() / (expected - x.float()).norm()
    return None if error < BOUND else f"a decoder layer is off by {float(error):.2%}"


def _layer(
    x: Tensor,
    matrices: dict[str, Tensor],
    norms: dict[str, Tensor],
    kept: tuple[Tensor, Tensor],
    turns: tuple[Tensor, Tensor],
) -> Tensor:
    """One new token behind PAST others, in fp32. Shape: (1, hidden) -> (1, hidden)."""
    plain = {name: matrix.float() for name, matrix in matrices.items()}
    hidden = x.float()
    cosines, sines = (turn.float() for turn in turns)

    def turned(heads: Tensor) -> Tensor:
        low, high = heads.chunk(2, -1)
        return heads * cosines + torch.cat([-high, low], -1) * sines

    normed = functional.rms_norm(hidden, (HIDDEN,), norms["first_norm"].float(), 1e-6)
    query = turned((normed @ plain["query"].T).view(HEADS, WIDTH))
    new = (turned((normed @ plain["key"].T).view(KV_HEADS, WIDTH)), (normed @ plain["value"].T).view(KV_HEADS, WIDTH))
    keys, values = (
        torch.cat([old.float().transpose(0, 1).reshape(KV_HEADS, -1, WIDTH)[:, :PAST], own.unsqueeze(1)], 1)
        for old, own in zip(kept, new, strict=True)
    )
    group = HEADS // KV_HEADS
    scores = torch.einsum("hgw,htw->hgt", query.view(KV_HEADS, group, WIDTH), keys) * WIDTH**-0.5
    context = torch.einsum("hgt,htw->hgw", scores.softmax(-1), values).reshape(1, -1)
    hidden = hidden + context @ plain["output"].T
    normed = functional.rms_norm(hidden, (HIDDEN,), norms["second_norm"].float(), 1e-6)
    return hidden + (functional.silu(normed @ plain["gate"].T) * (normed @ plain["up"].T)) @ plain["down"].T
