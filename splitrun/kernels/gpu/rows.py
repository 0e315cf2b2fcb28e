"""What is done row by row between products: norms, rotary embedding with the write into the KV blocks, gates.

Each row is computed alone, so its bits do not depend on the rows beside it. Knows no models.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from splitrun.kernels.gpu.shapes import Heads, History


@triton.jit
def _norm(x, weight, out, columns, epsilon, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDE)
    inside = place < columns
    values = tl.load(x + row * columns + place, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + epsilon)
    scaled = (wide * scale).to(values.dtype).to(tl.float32)
    scaled *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + place, scaled.to(values.dtype), mask=inside)


def norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> Tensor:
    """RMSNorm of each row, as transformers rounds it. Shape: (rows, columns), contiguous. Returns ``out``."""
    rows, columns = x.shape
    wide = triton.next_power_of_2(columns)
    _norm[(rows,)](x, weight, out, columns, epsilon, WIDE=wide, num_warps=min(16, max(1, wide // 512)))
    return out


@triton.jit
def turned(first, second, cosine, sine, TYPE: tl.constexpr):
    """Both halves of heads after the rotary embedding, rounded once."""
    return (first * cosine - second * sine).to(TYPE), (second * cosine + first * sine).to(TYPE)


@triton.jit
def head_halves(source, norm_weight, places, inside, half, width, epsilon, NORMED: tl.constexpr, ACROSS: tl.constexpr):
    """The halves of heads in fp32, normalized over the head where NORMED. ``ACROSS``: the axis of the head."""
    first = tl.load(source + places, mask=inside, other=0.0)
    second = tl.load(source + places + half, mask=inside, other=0.0)
    type = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORMED:
        squares = tl.sum(first * first + second * second, axis=ACROSS, keep_dims=True)
        scale = tl.rsqrt(squares / width + epsilon)
        lane = tl.arange(0, inside.shape[ACROSS])
        weight = tl.load(norm_weight + lane, mask=lane < half, other=0.0).to(tl.float32)
        other = tl.load(norm_weight + half + lane, mask=lane < half, other=0.0).to(tl.float32)
        if ACROSS == 1:
            weight, other = weight[None, :], other[None, :]
        first = ((first * scale).to(type).to(tl.float32) * weight).to(type).to(tl.float32)
        second = ((second * scale).to(type).to(tl.float32) * other).to(type).to(tl.float32)
    return first, second


@triton.jit
def _place(
    projected,
    cosines,
    sines,
    query_norm,
    key_norm,
    keys,
    values,
    tables,
    token_rows,
    positions,
    blocks,
    block_tokens,
    heads,
    kv_heads,
    width,
    epsilon,
    NORMED: tl.constexpr,
    HALF: tl.constexpr,
):
    """One head of one token: queries are turned where they lie, keys and values go to their block."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = width // 2
    lane = tl.arange(0, HALF)
    inside = lane < half
    source = projected + token * ((heads + 2 * kv_heads) * width) + head * width
    position = tl.load(positions + token)
    if position < 0:
        return
    block = tl.load(tables + tl.load(token_rows + token) * blocks + position // block_tokens).to(tl.int64)
    kv_type: tl.constexpr = keys.dtype.element_ty
    if head < heads + kv_heads:
        cosine = tl.load(cosines + token * width + lane, mask=inside, other=0.0)
        sine = tl.load(sines + token * width + lane, mask=inside, other=0.0)
        weight = query_norm if head < heads else key_norm
        first, second = head_halves(source, weight, lane, inside, half, width, epsilon, NORMED, 0)
        first, second = turned(first, second, cosine, sine, projected.dtype.element_ty)
        if head < heads:
            tl.store(source + lane, first, mask=inside)
            tl.store(source + half + lane, second, mask=inside)
        else:
            place = ((block * kv_heads + head - heads) * block_tokens + position % block_tokens) * width
            tl.store(keys + place + lane, first.to(kv_type), mask=inside)
            tl.store(keys + place + half + lane, second.to(kv_type), mask=inside)
    else:
        place = ((block * kv_heads + head - heads - kv_heads) * block_tokens + position % block_tokens) * width
        first = tl.load(source + lane, mask=inside, other=0.0)
        second = tl.load(source + half + lane, mask=inside, other=0.0)
        tl.store(values + place + lane, first.to(kv_type), mask=inside)
        tl.store(values + place + half + lane, second.to(kv_type), mask=inside)


def place(projected: Tensor, heads: Heads, history: History, cosines: Tensor, sines: Tensor) -> None:
    """Normalize and turn the queries of ``projected`` in place, and write its keys and values into the blocks; tokens
    of negative position are left alone.

    Shape: projected (tokens, (heads + 2 * kv_heads) * width); cosines and sines fp32 (tokens, width).
    """
    half = triton.next_power_of_2(heads.width // 2)
    normed = heads.query_norm is not None
    _place[(projected.shape[0], heads.heads + 2 * heads.kv_heads)](
        projected,
        cosines,
        sines,
        heads.query_norm if normed else projected,
        heads.key_norm if normed else projected,
        heads.keys,
        heads.values,
        history.tables,
        history.token_rows,
        history.positions,
        history.tables.shape[1],
        heads.block_tokens,
        heads.heads,
        heads.kv_heads,
        heads.width,
        heads.epsilon,
        NORMED=normed,
        HALF=half,
        num_warps=1,
    )


@triton.jit
def _gate(gates, out, columns, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = place < columns
    gate = tl.load(gates + row * 2 * columns + place, mask=inside, other=0.0)
    up = tl.load(gates + row * 2 * columns + columns + place, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * columns + place, active.to(gate.dtype), mask=inside)


def gate(gates: Tensor, out: Tensor) -> Tensor:
    """silu(gate) * up. Shape: gates (rows, 2 * columns), gates first; out (rows, columns). Returns ``out``."""
    rows, columns = out.shape
    _gate[(rows, triton.cdiv(columns, 1024))](gates, out, columns, WIDE=1024)
    return out
