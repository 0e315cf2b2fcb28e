"""What the compiled kernels compute, in plain torch: the same bits, slowly.

A product with few rows, and one of many rows in int8: activations become int8 per group of 64 columns (code = value x
127 / largest magnitude, rounded to even; a group with NaN or infinity gets the scale NaN); nf4 weights use the table
times 127 rounded to int8; sums over a group are integers; fp32 products and sums then run in the order of the groups,
so a row's bits depend on nothing but that row.

Error bound, per output, against the exact product of the stored values: the sum over groups g of
    A_g / 254 x |W|_1,g  +  (nf4 only)  M_g / 254 x |x|_1,g  x (1 + 1/127)
with A_g, M_g the largest magnitudes of the activations and of the weights' block, and |.|_1,g sums of magnitudes; plus
fp32 and output rounding. Typical, for normally distributed values: 1.0 % (nf4), 0.7 % (int8) of the result's norm.

``span``: groups that share one activation scale and, in nf4, one weight scale, the largest of theirs, to which codes
are rounded again (kernels for tile instructions take 8). Read A_g and M_g as those of the span; M_g counts twice.
Typical: 1.2 % and 0.8 %.

A product of many rows in int16 has codes up to 16383 for activations and 1722 for the table (`WIDE`), in place of 127:
read 32766 and 3444 for 254 above.

A product of many rows in bf16 multiplies values rounded to bf16 in fp32 sums: `many_bound`. So does one of few rows
with a bf16 matrix at a level with dot products of bf16; what is smaller than fp32's normal numbers is zero there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitrun.kernels.nf4_definition import BLOCK, NF4_TABLE

GROUP = 64
LANES = 16
"""Partial sums along a row of a 16-bit matrix."""
SMALLEST = 1e-30
"""A group without a larger magnitude counts as zeros."""


@dataclass(frozen=True)
class Codes:
    """The largest integers that stand for an activation, and for a value of nf4's table."""

    activation: int = 127
    table: int = 127


WIDE = Codes(16383, 1722)
"""Of products in int16."""


def nf4_integers(most: int = 127) -> Tensor:
    """The table of 16 values times the largest integer, rounded. Shape: int64 (16,)."""
    return (torch.tensor(NF4_TABLE) * most).round().long()


def quantize_activations(x: Tensor, unit: float, span: int = 1, most: int = 127) -> tuple[Tensor, Tensor]:
    """Codes and scales. Shape: (rows, n) -> int64 (rows, spans, 64 * span), fp32 (rows, spans); missing columns are 0.

    ``unit``: what the largest magnitude is multiplied with to become the scale; ``most``: the largest code.
    """
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % (GROUP * span)))
    groups = padded.view(x.shape[0], -1, GROUP * span)
    largest = groups.abs().amax(-1)
    finite = torch.isfinite(groups).all(-1)
    used = finite & (largest >= SMALLEST)
    inverse = torch.where(used, torch.tensor(float(most)) / largest, 0.0)
    codes = (torch.where(used.unsqueeze(-1), groups, 0.0) * inverse.unsqueeze(-1)).round().long()
    scales = torch.where(used, largest * torch.tensor(unit), torch.where(finite, 0.0, torch.nan))
    return codes, scales


def product_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    bias: Tensor | None = None,
    span: int = 1,
    most: Codes = Codes(),
) -> Tensor:
    """``x @ W.T + bias`` in x's dtype. Shape: (rows, n), int64 (out, n), fp32 (out, n / 64) or (out,) -> (rows, out).

    ``codes`` are the integers that stand for a weight's values: -127..127, or as far as ``most`` says.
    """
    unit = torch.tensor(1.0) / torch.tensor(float(most.activation))
    if format == "nf4":
        unit = unit * (torch.tensor(1.0) / torch.tensor(float(most.table)))
        codes, scales = _spanned(codes, scales, span)
    activations, activation_scales = quantize_activations(x, float(unit), span, most.activation)
    width = GROUP * span
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % width)).view(codes.shape[0], -1, width)
    sums = torch.zeros(x.shape[0], codes.shape[0])
    for group in range(padded.shape[1]):
        dots = (activations[:, group].double() @ padded[:, group].double().T).float()
        scale = activation_scales[:, group].unsqueeze(1)
        if format == "nf4":
            scale = scales[:, group].unsqueeze(0) * scale
        sums = sums + dots * scale
    if format == "int8":
        sums = sums * scales.unsqueeze(0)
    if bias is not None:
        sums = sums + bias.float()
    return sums.to(x.dtype)


def _spanned(codes: Tensor, scales: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """nf4 codes for scales of spans. Shape: int64 (out, n), fp32 (out, groups) -> (out, n), (out, spans).

    A group's share of its span's largest scale is an integer of 1 / 32768; both roundings go half up.
    """
    if span == 1:
        return codes, scales
    largest = torch.nn.functional.pad(scales, (0, -scales.shape[1] % span)).view(scales.shape[0], -1, span).amax(-1)
    each = largest.repeat_interleave(span, 1)[:, : scales.shape[1]]
    ratios = (torch.where(each > 0, scales / each, 0.0) * 32767).round().long().repeat_interleave(GROUP, 1)
    return ((((codes * 256 * ratios + (1 << 14)) >> 15) + 128) >> 8), largest


def many_bound(x: Tensor, values: Tensor, exact: Tensor) -> Tensor:
    """How far a product in fp32 sums may be from the exact one of these values. Shape: (rows, out), float64.

    fp32 sums of n terms, n 2^-23 of the terms' magnitudes; half a unit of bf16 for the output; and what is smaller
    than fp32's normal numbers counts as zero.
    """
    magnitudes = x.double().abs() @ values.double().abs().T
    return magnitudes * x.shape[-1] * 2.0**-23 + exact.abs() * 2.0**-8 + 1e-30


def dense_reference(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ values.T + bias`` in x's dtype: sums over every 16th column, one after the other, then added pairwise.

    Shape: (rows, n), (out, n) of a 16-bit type -> (rows, out).
    """
    padding = (0, -x.shape[-1] % LANES)
    left = torch.nn.functional.pad(x.float(), padding).view(x.shape[0], 1, -1, LANES)
    right = torch.nn.functional.pad(values.float(), padding).view(1, values.shape[0], -1, LANES)
    sums = torch.zeros(x.shape[0], values.shape[0], LANES)
    for place in range(left.shape[2]):
        sums = sums + left[:, :, place] * right[:, :, place]
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    total = sums[..., 0]
    return (total if bias is None else total + bias.float()).to(x.dtype)


def nf4_codes(packed: Tensor, most: int = 127) -> Tensor:
    """Integers of packed codes, up to the largest. Shape: uint8 (out, n / 2) -> int64 (out, n)."""
    indices = torch.stack([packed >> 4, packed & 15], -1).view(packed.shape[0], -1)
    return nf4_integers(most)[indices.long()]


assert GROUP == BLOCK, "an nf4 scale covers the columns of one activation scale"
