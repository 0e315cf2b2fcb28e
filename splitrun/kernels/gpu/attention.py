"""Attention straight over the KV blocks: one new token per row (decoding), or many (prompts).

Scores and sums are fp32, with the maximum kept while the history passes by (online softmax; Dao et al.,
"FlashAttention", 2022), so memory does not grow with the history. A decoded row is cut into parts by its own length
alone: its bits do not depend on the rows beside it. Knows no models.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitrun.kernels.gpu.library import USUAL_WIDTH
from splitrun.kernels.gpu.rows import head_halves, turned
from splitrun.kernels.gpu.shapes import Heads, History

PARTS = 32
"""Programs that share the history of a row and KV head."""
TILE = 64
"""Tokens of a history read at a time."""


@triton.jit
def _history(
    query_first, query_second, keys, values, table, head_tokens, each_tokens, begin, end, first_token, length,
    block_tokens, width, scaling, GROUP_ROWS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Attend to the tokens from ``first_token`` to ``length``, exclusive, that lie in the tiles ``begin`` to ``end``.

    ``table`` has the row's blocks; a block has ``each_tokens`` tokens of all KV heads, and those of this one from
    ``head_tokens`` on. Returns maximum and sum of the weights, and the weighted values. Shape: (GROUP_ROWS,) twice,
    (GROUP_ROWS, WIDTH).
    """
    type: tl.constexpr = query_first.dtype
    half = width // 2
    lane, wide = tl.arange(0, HALF), tl.arange(0, WIDTH)
    maximum = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    weighted = tl.zeros((GROUP_ROWS, WIDTH), tl.float32)
    for tile in range(begin, end):
        token = tile * TILE + tl.arange(0, TILE)
        seen = (token >= first_token) & (token < length)
        block = tl.load(table + token // block_tokens, mask=seen, other=0).to(tl.int64)
        at = (block * each_tokens + head_tokens + token % block_tokens) * width
        here = seen[:, None] & (lane < half)[None, :]
        key_first = tl.load(keys + at[:, None] + lane[None, :], mask=here, other=0.0).to(type)
        key_second = tl.load(keys + at[:, None] + half + lane[None, :], mask=here, other=0.0).to(type)
        scores = tl.dot(query_first, tl.trans(key_first))
        scores = tl.dot(query_second, tl.trans(key_second), scores) * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        value = tl.load(values + at[:, None] + wide[None, :], mask=seen[:, None] & (wide < width)[None, :], other=0.0)
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(maximum - safe)
        weights = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(type), value.to(type), weighted * shrink[:, None])
        maximum = highest
    return maximum, total, weighted


@triton.jit
def _own_token(
    source, key_norm, keys, values, block, query_first, query_second, cosine, sine, kv_head, kv_heads, heads, length,
    block_tokens, width, scaling, epsilon, NORMED: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write the new token's key and value to ``block``. Returns its scores and its value. Shape: (GROUP_ROWS,),
    (WIDTH,)."""
    kv_type: tl.constexpr = keys.dtype.element_ty
    half = width // 2
    lane, wide = tl.arange(0, HALF), tl.arange(0, WIDTH)
    own = source + (heads + kv_head) * width
    first, second = head_halves(own, key_norm, lane[None, :], (lane < half)[None, :], half, width, epsilon, NORMED, 1)
    first, second = turned(first, second, cosine[None, :], sine[None, :], query_first.dtype)
    first, second = first.to(kv_type), second.to(kv_type)
    value = tl.load(source + (heads + kv_heads + kv_head) * width + wide, mask=wide < width, other=0.0).to(kv_type)
    place = ((block * kv_heads + kv_head) * block_tokens + length % block_tokens) * width
    tl.store(keys + place + lane[None, :], first, mask=(lane < half)[None, :])
    tl.store(keys + place + half + lane[None, :], second, mask=(lane < half)[None, :])
    tl.store(values + place + wide, value, mask=wide < width)
    products = query_first.to(tl.float32) * first.to(tl.float32)
    products += query_second.to(tl.float32) * second.to(tl.float32)
    return tl.sum(products, axis=1) * scaling, value.to(tl.float32)


@triton.jit
def _decode(
    projected, cosines, sines, query_norm, key_norm, keys, values, tables, lengths, sums, marks, blocks, block_tokens,
    kv_heads, width, window, scaling, epsilon, NORMED: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One part of the history of one row, for the query heads of one KV head.

    sums   fp32 (rows, kv_heads, PARTS, GROUP_ROWS, WIDTH): values weighted by exp(score - maximum)
    marks  fp32 (rows, kv_heads, PARTS, 2, GROUP_ROWS): maximum and sum of the weights
    The part that reaches the new token also writes its key and value to their block.
    """
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    if length < 0:
        return
    type: tl.constexpr = projected.dtype.element_ty
    half = width // 2
    heads = kv_heads * GROUP
    member, lane, wide = tl.arange(0, GROUP_ROWS), tl.arange(0, HALF), tl.arange(0, WIDTH)
    first_token = tl.maximum(length + 1 - window, 0)
    first_tile = first_token // TILE
    tiles = length // TILE + 1 - first_tile
    each = tl.cdiv(tiles, PARTS)
    begin = first_tile + part * each
    end = tl.minimum(begin + each, first_tile + tiles)
    cell = ((row * kv_heads + kv_head) * PARTS + part).to(tl.int64)
    marked = marks + cell * 2 * GROUP_ROWS + member
    if begin >= end:
        tl.store(marked, tl.full((GROUP_ROWS,), float("-inf"), tl.float32))
        return
    source = projected + row.to(tl.int64) * ((heads + 2 * kv_heads) * width)
    cosine = tl.load(cosines + row * width + lane, mask=lane < half, other=0.0)
    sine = tl.load(sines + row * width + lane, mask=lane < half, other=0.0)
    inside = (member < GROUP)[:, None] & (lane < half)[None, :]
    places = (kv_head * GROUP + member)[:, None] * width + lane[None, :]
    first, second = head_halves(source, query_norm, places, inside, half, width, epsilon, NORMED, 1)
    query_first, query_second = turned(first, second, cosine[None, :], sine[None, :], type)

    maximum, total, weighted = _history(
        query_first, query_second, keys, values, tables + row * blocks, kv_head * block_tokens, kv_heads * block_tokens,
        begin, end, first_token, length, block_tokens, width, scaling, GROUP_ROWS, HALF, WIDTH, TILE
    )  # fmt: skip
    if end == first_tile + tiles:
        block = tl.load(tables + row * blocks + length // block_tokens).to(tl.int64)
        score, value = _own_token(
            source, key_norm, keys, values, block, query_first, query_second, cosine, sine, kv_head, kv_heads, heads,
            length, block_tokens, width, scaling, epsilon, NORMED, HALF, WIDTH
        )  # fmt: skip
        highest = tl.maximum(maximum, score)
        shrink, weight = tl.exp(maximum - highest), tl.exp(score - highest)
        total = total * shrink + weight
        weighted = weighted * shrink[:, None] + weight[:, None] * value[None, :]
        maximum = highest
    tl.store(marked, maximum)
    tl.store(marked + GROUP_ROWS, total)
    tl.store(sums + cell * (GROUP_ROWS * WIDTH) + member[:, None] * WIDTH + wide[None, :], weighted)


@triton.jit
def _merge(
    sums,
    marks,
    lengths,
    out,
    kv_heads,
    width,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One head of one row from its parts."""
    row, head = tl.program_id(0), tl.program_id(1)
    if tl.load(lengths + row) < 0:
        return
    kv_head, member = head // GROUP, head % GROUP
    part, wide = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    cell = ((row * kv_heads + kv_head) * PARTS + part).to(tl.int64)
    maximum = tl.load(marks + cell * 2 * GROUP_ROWS + member)
    filled = maximum > float("-inf")
    total = tl.load(marks + cell * 2 * GROUP_ROWS + GROUP_ROWS + member, mask=filled, other=0.0)
    place = (cell * GROUP_ROWS + member) * WIDTH
    inside = filled[:, None] & (wide < width)[None, :]
    weighted = tl.load(sums + place[:, None] + wide[None, :], mask=inside, other=0.0)
    share = tl.exp(maximum - tl.max(maximum, axis=0))
    result = tl.sum(weighted * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    target = out + (row.to(tl.int64) * kv_heads * GROUP + head) * width + wide
    tl.store(target, result.to(out.dtype.element_ty), mask=wide < width)


class DecodeAttention:
    """Attention of decoding rows; layers with the same heads share its memory."""

    def __init__(self, heads: Heads, rows: int, device: torch.device) -> None:
        self._group_rows = max(16, triton.next_power_of_2(heads.heads // heads.kv_heads))
        self._width = max(16, triton.next_power_of_2(heads.width))
        cells = (rows, heads.kv_heads, PARTS)
        self._sums = torch.empty((*cells, self._group_rows, self._width), dtype=torch.float32, device=device)
        self._marks = torch.empty((*cells, 2, self._group_rows), dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return self._sums.nbytes + self._marks.nbytes

    def __call__(
        self, projected: Tensor, heads: Heads, history: History, cosines: Tensor, sines: Tensor, out: Tensor
    ) -> Tensor:
        """Attend one new token per row, whose key and value are written to its block. Returns ``out``.

        Shape: projected (rows, (heads + 2 * kv_heads) * width); cosines and sines fp32 (rows, width); out (rows, heads
        * width). All on the GPU, contiguous. Rows whose length is negative are left alone.
        """
        rows, group = projected.shape[0], heads.heads // heads.kv_heads
        normed = heads.query_norm is not None
        _decode[(rows, heads.kv_heads, PARTS)](
            projected,
            cosines,
            sines,
            heads.query_norm if normed else projected,
            heads.key_norm if normed else projected,
            heads.keys,
            heads.values,
            history.tables,
            history.lengths,
            self._sums,
            self._marks,
            history.tables.shape[1],
            heads.block_tokens,
            heads.kv_heads,
            heads.width,
            heads.window or NO_WINDOW,
            heads.scaling,
            heads.epsilon,
            NORMED=normed,
            GROUP=group,
            GROUP_ROWS=self._group_rows,
            HALF=max(16, triton.next_power_of_2(heads.width // 2)),
            WIDTH=self._width,
            PARTS=PARTS,
            TILE=TILE,
        )
        _merge[(rows, heads.heads)](
            self._sums,
            self._marks,
            history.lengths,
            out,
            heads.kv_heads,
            heads.width,
            GROUP=group,
            GROUP_ROWS=self._group_rows,
            WIDTH=self._width,
            PARTS=PARTS,
        )
        return out


NO_WINDOW = 1 << 30
"""A window that holds every sequence."""


@triton.jit
def _prompt(
    projected,
    keys,
    values,
    tables,
    lengths,
    starts,
    out,
    blocks,
    block_tokens,
    heads,
    kv_heads,
    width,
    window,
    scaling,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of new tokens of one row and head, over all tokens up to them; the new ones are in their blocks."""
    tile_of_queries, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    if tile_of_queries * QUERIES >= count:
        return
    length = tl.load(lengths + row)
    kv_head = head // GROUP
    type: tl.constexpr = projected.dtype.element_ty
    index, wide = tile_of_queries * QUERIES + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    position = length + index
    stride = (heads + 2 * kv_heads) * width
    inside = (index < count)[:, None] & (wide < width)[None, :]
    source = projected + (start + index).to(tl.int64)[:, None] * stride + head * width + wide[None, :]
    query = tl.load(source, mask=inside, other=0.0)
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES, WIDTH), tl.float32)
    oldest = tl.maximum(length + tile_of_queries * QUERIES + 1 - window, 0)
    last = length + tl.minimum(tile_of_queries * QUERIES + QUERIES, count)
    for tile in range(oldest // TILE, tl.cdiv(last, TILE)):
        token = tile * TILE + tl.arange(0, TILE)
        kept = (token >= oldest) & (token < last)
        block = tl.load(tables + row * blocks + token // block_tokens, mask=kept, other=0).to(tl.int64)
        at = ((block * kv_heads + kv_head) * block_tokens + token % block_tokens) * width
        here = kept[:, None] & (wide < width)[None, :]
        key = tl.load(keys + at[:, None] + wide[None, :], mask=here, other=0.0).to(type)
        seen = kept[None, :] & (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, tl.dot(query, tl.trans(key)) * scaling, float("-inf"))
        value = tl.load(values + at[:, None] + wide[None, :], mask=here, other=0.0).to(type)
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(maximum - safe)
        weights = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(type), value, weighted * shrink[:, None])
        maximum = highest
    target = out + ((start + index).to(tl.int64)[:, None] * heads + head) * width + wide[None, :]
    tl.store(target, (weighted / total[:, None]).to(type), mask=inside)


def prompt_attention(projected: Tensor, heads: Heads, history: History, out: Tensor) -> Tensor:
    """Attend the new tokens of every row, whose keys and values lie in their blocks already. Returns ``out``.

    Shape: projected (tokens, (heads + 2 * kv_heads) * width), turned; out (tokens, heads * width).
    """
    queries, rows = 64, history.lengths.shape[0]
    width = max(16, triton.next_power_of_2(heads.width))
    _prompt[(triton.cdiv(history.longest, queries), heads.heads, rows)](
        projected,
        heads.keys,
        heads.values,
        history.tables,
        history.lengths,
        history.starts,
        out,
        history.tables.shape[1],
        heads.block_tokens,
        heads.heads,
        heads.kv_heads,
        heads.width,
        heads.window or NO_WINDOW,
        heads.scaling,
        GROUP=heads.heads // heads.kv_heads,
        WIDTH=width,
        QUERIES=queries,
        TILE=TILE,
        num_warps=4,
        num_stages=2 if width <= USUAL_WIDTH else 1,  # of wider ones two keys and values have no room
    )
    return out
