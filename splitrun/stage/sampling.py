"""Choose the next token of each row from its logits, on the device of the logits; one small copy comes back.

A choice depends on the row's own logits, parameters, seed and position: not on the rows beside it, nor on how many
there are. The greedy choice among equals is the lowest id. Knows nothing of sequences or of what a token means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from splitrun.schedule.request import SamplingParams, TokenLogprob
from splitrun.schedule.step import RowSampling, RowTokens
from splitrun.stage.draw import draw

GROUP_VALUES = 2**19
"""Logits handled at once (or one row, where a vocabulary is larger), so that the workspace does not grow with rows."""


def sample(logits: Tensor, rows: Sequence[RowSampling]) -> list[RowTokens]:
    """The next token of each row, with log-probabilities where asked for; none where the row's largest logit is NaN or
    infinite.

    ``logits``, shape (rows, vocabulary), any floating type, are not modified. Order: log-probabilities from the logits
    as they are; then logit_bias, repetition, presence and frequency penalty, temperature, top_k, top_p, min_p.
    """
    assert len(logits) == len(rows), f"{len(logits)} rows of logits for {len(rows)} to choose"
    if not rows:
        return []
    if all(map(is_plain, rows)):
        best = logits.max(dim=-1)
        chosen = torch.where(best.values.isfinite(), best.indices, -1).tolist()
        return [RowTokens((token,)) if token >= 0 else RowTokens() for token in chosen]
    top = min(max(row.params.logprobs or 0 for row in rows), logits.shape[1])
    packed: list[Tensor] = []
    for first, last in _groups(logits):
        packed.append(_sample_group(logits[first:last].float(), rows[first:last], top))
    return [_unpack(numbers, row.params) for numbers, row in zip(_bring_back(packed), rows, strict=True)]


def prompt_logprobs(logits: Tensor, targets: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """The log-probability of each target under its row of logits, and the ``top`` most likely tokens there.

    ``logits`` has shape (count, vocabulary) with one row per target. Nothing when the largest logit of one is NaN or
    infinite.
    """
    assert len(logits) == len(targets), f"{len(logits)} rows of logits for {len(targets)} targets"
    if not targets:
        return ()
    chosen = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    top, packed = min(top, logits.shape[1]), []
    for first, last in _groups(logits):
        group = logits[first:last].float()
        packed.append(_pack(group, chosen[first:last], top, wanted=True))
    found = _bring_back(packed)
    if any(int(numbers[0]) < 0 for numbers in found):
        return ()
    return tuple(_logprob(numbers, top) for numbers in found)


def is_plain(row: RowSampling) -> bool:
    """Whether the row wants the most likely token and nothing beside it."""
    return row.params.temperature == 0.0 and row.params.logprobs is None and not _is_adjusted(row)


def _groups(logits: Tensor) -> Iterator[tuple[int, int]]:
    count = max(1, GROUP_VALUES // logits.shape[1])
    return ((first, min(first + count, len(logits))) for first in range(0, len(logits), count))


def _is_adjusted(row: RowSampling) -> bool:
    params = row.params
    return bool(
        params.logit_bias or params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


def _sample_group(logits: Tensor, rows: Sequence[RowSampling], top: int) -> Tensor:
    adjusted = logits
    if any(_is_adjusted(row) for row in rows):
        adjusted = logits.clone()
        _add_bias(adjusted, rows)
        _penalize_repetition(adjusted, rows)
        _penalize_output(adjusted, rows)
    greedy = [row.params.temperature == 0.0 for row in rows]
    chosen = adjusted.argmax(dim=-1) if any(greedy) else draw(adjusted, rows)
    if any(greedy) and not all(greedy):
        chosen = torch.where(torch.tensor(greedy, device=logits.device), chosen, draw(adjusted, rows))
    return _pack(logits, chosen, top, wanted=any(row.params.logprobs is not None for row in rows))


# ---- adjustments, in place ----


def _entries(logits: Tensor, entries: Sequence[tuple[int, int, float]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(row, token, number) triples as an index into the logits and the numbers beside it."""
    rows, tokens, numbers = zip(*entries, strict=True)
    index = torch.tensor([rows, tokens], dtype=torch.int64, device=logits.device)
    return (index[0], index[1]), torch.tensor(numbers, dtype=torch.float32, device=logits.device)


def _add_bias(logits: Tensor, rows: Sequence[RowSampling]) -> None:
    entries = [(at, token, bias) for at, row in enumerate(rows) for token, bias in row.params.logit_bias.items()]
    if entries:
        index, biases = _entries(logits, entries)
        logits[index] += biases


def _penalize_repetition(logits: Tensor, rows: Sequence[RowSampling]) -> None:
    """Positive logits of tokens seen in prompt or output are divided by the penalty, others multiplied (CTRL, 2019)."""
    entries = [
        (at, token, row.params.repetition_penalty)
        for at, row in enumerate(rows)
        if row.params.repetition_penalty != 1.0
        for token in {*row.prompt_ids, *row.output_ids}
    ]
    if entries:
        index, penalties = _entries(logits, entries)
        seen = logits[index]
        logits[index] = torch.where(seen > 0, seen / penalties, seen * penalties)


def _penalize_output(logits: Tensor, rows: Sequence[RowSampling]) -> None:
    """Presence penalty once, frequency penalty as often as the token was generated: OpenAI's definition."""
    entries = [
        (at, token, row.params.presence_penalty + row.params.frequency_penalty * count)
        for at, row in enumerate(rows)
        if row.params.presence_penalty or row.params.frequency_penalty
        for token, count in Counter(row.output_ids).items()
    ]
    if entries:
        index, penalties = _entries(logits, entries)
        logits[index] -= penalties


# ---- the way back ----


def _pack(logits: Tensor, chosen: Tensor, top: int, *, wanted: bool) -> Tensor:
    """Chosen id (-1 where the logits are not finite), its log-probability, ``top`` ids and their log-probabilities.

    Shape: (rows, 2 + 2 * top), int32; log-probabilities as the bits of a float32. Zeros unless ``wanted``.
    """
    packed = torch.zeros(len(logits), 2 + 2 * top, dtype=torch.int32, device=logits.device)
    packed[:, 0] = torch.where(logits.amax(dim=-1).isfinite(), chosen, -1)
    if wanted:
        logprobs = logits.log_softmax(dim=-1)
        packed[:, 1] = logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1).view(torch.int32)
        for rank in range(top):
            best = logprobs.max(dim=-1)  # not topk: among equals the lowest id comes first
            packed[:, 2 + rank] = best.indices
            packed[:, 2 + top + rank] = best.values.view(torch.int32)
            logprobs.scatter_(1, best.indices.unsqueeze(1), float("-inf"))
    return packed


def _bring_back(packed: Sequence[Tensor]) -> list[Tensor]:
    """The one copy to the host: a tensor of numbers per row."""
    return list(torch.cat(list(packed)).cpu())


def _unpack(numbers: Tensor, params: SamplingParams) -> RowTokens:
    token = int(numbers[0])
    if token < 0:
        return RowTokens()
    if params.logprobs is None:
        return RowTokens((token,))
    return RowTokens((token,), logprobs=(_logprob(numbers, params.logprobs),))


def _logprob(numbers: Tensor, top: int) -> TokenLogprob:
    """A row of ``_pack``, with the first ``top`` of its alternatives; impossible tokens are none."""
    stored = (len(numbers) - 2) // 2
    ids = numbers[2 : 2 + min(top, stored)].tolist()
    floats = numbers.view(torch.float32)
    values = floats[2 + stored : 2 + stored + len(ids)].tolist()
    possible = tuple((token, value) for token, value in zip(ids, values, strict=True) if value > float("-inf"))
    return TokenLogprob(int(numbers[0]), float(floats[1]), possible)
