"""Draw one token per row from its logits: temperature, top_k, top_p, min_p, and a number in [0, 1) that decides.

Floating-point sums over a vocabulary depend on the order of addition, which differs with the device and the number of
rows. So probabilities become whole numbers, in units of 2**-40 of the most likely token's, and every sum is exact: a
row's draw depends on that row alone. A filter never splits tokens of equal probability: it keeps all of them or none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitrun.schedule.step import RowSampling
from splitrun.stage.uniform import uniform

ONE = 2**40
"""Weight of a row's most likely token; the weights of 2**22 tokens still sum within 63 bits."""


def draw(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """One token per row, by inverting the cumulative distribution in the order of ids.

    ``logits``: float32, shape (rows, vocabulary), not modified. Temperature 0 is drawn as 1: the caller has chosen
    already. Returns int64, shape (rows,).
    """
    if logits.device.type == "cpu" and all(row.params.top_k for row in rows):
        return torch.cat([_draw_among_few(own, row) for own, row in zip(logits, rows, strict=True)])
    return _draw_among_all(logits, rows)


def _draw_among_few(logits: Tensor, row: RowSampling) -> Tensor:
    """The same for one row with a top_k: whatever else is asked concerns only what that keeps. Shape: (vocabulary,) ->
    (1,). Twice to six times as fast, for the smallest of what is kept is found without sorting."""
    least = logits.topk(min(row.params.top_k, len(logits))).values[-1]
    kept = (logits >= least).nonzero().squeeze(1)
    if not len(kept):  # NaN: the caller says so
        return kept.new_zeros(1)
    return kept[_draw_among_all(logits[kept].unsqueeze(0), [row])]


def _draw_among_all(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    # Metal has no float64; there the draw is as exact as float32.
    real = torch.float32 if logits.device.type == "mps" else torch.float64
    numbers = [
        (row.params.temperature or 1.0, row.params.top_p, row.params.min_p, uniform(row.seed, row.position))
        for row in rows
    ]
    table = torch.tensor(numbers, dtype=real, device=logits.device)
    temperature, top_p, min_p, uniforms = (table[:, column : column + 1] for column in range(4))
    shifted = (logits - logits.amax(dim=-1, keepdim=True)).to(real)
    weights = shifted.div_(temperature).exp_().mul_(ONE).to(torch.int64)
    if any(row.params.top_k for row in rows):
        _keep_top_k(weights, logits, [row.params.top_k for row in rows])
    if any(row.params.top_p < 1.0 for row in rows):
        _keep_top_p(weights, top_p)
    if any(row.params.min_p for row in rows):
        weights.masked_fill_(weights < min_p.mul(ONE).ceil().to(torch.int64), 0)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniforms * total.to(real)).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _keep_top_k(weights: Tensor, logits: Tensor, counts: Sequence[int]) -> None:
    """Clear the weights below the row's k-th largest logit; 0 keeps all."""
    vocabulary = logits.shape[1]
    kept = [min(count, vocabulary) or vocabulary for count in counts]
    largest = logits.topk(max(min(count, vocabulary) for count in counts), dim=-1).values
    last = torch.tensor([[min(count, largest.shape[1]) - 1] for count in kept], device=logits.device)
    off = torch.tensor([[count == 0] for count in counts], device=logits.device)
    threshold = largest.gather(1, last).masked_fill(off, float("-inf"))
    weights.masked_fill_(logits < threshold, 0)


def _keep_top_p(weights: Tensor, top_p: Tensor) -> None:
    """Clear the weights of tokens when more likely ones hold ``top_p`` of the mass already."""
    total = weights.sum(dim=-1, keepdim=True)
    share = (top_p * total.to(top_p.dtype)).to(torch.int64).clamp_(min=1)
    limit = torch.where(top_p < 1.0, share, total)
    descending = _largest(weights, limit)
    before = descending.cumsum(dim=-1) - descending
    threshold = descending.masked_fill(before >= limit, torch.iinfo(torch.int64).max).amin(dim=-1, keepdim=True)
    weights.masked_fill_(weights < threshold, 0)


def _largest(weights: Tensor, limit: Tensor) -> Tensor:
    """The rows' largest weights, descending, at least so many that they hold ``limit``.

    On the CPU the head of the distribution nearly always suffices, and is found 20 times faster than a full sort; on
    other devices asking whether it suffices would cost a synchronisation.
    """
    count = 512
    while weights.device.type == "cpu" and count < weights.shape[1]:
        head = weights.topk(count, dim=-1).values
        if bool((head.sum(dim=-1, keepdim=True) >= limit).all()):
            return head
        count *= 16
    return weights.sort(dim=-1, descending=True).values
