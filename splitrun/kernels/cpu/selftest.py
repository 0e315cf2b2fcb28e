"""Whether a level gives the reference's bits on this machine. A few milliseconds; run before a level is first used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from splitrun.kernels.cpu.library import Kernel
from splitrun.kernels.cpu.many import ManyRows
from splitrun.kernels.cpu.reference import WIDE, Codes, dense_reference, many_bound, nf4_codes, product_reference
from splitrun.kernels.int8 import Int8Weight, quantize_int8
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE, dequantize_reference, quantize_nf4

ROWS = (1, 2, 3, 4, 5, 8, 16)
OUTPUTS = 37
"""Two whole tiles and a short one."""


def first_fault(kernel: Kernel) -> str | None:
    """What differs from the reference first, None when nothing does."""
    generator = torch.Generator().manual_seed(7)
    for format, columns in (("nf4", 192), ("int8", 148)):
        values = torch.randn(OUTPUTS, columns, generator=generator)
        x = torch.randn(max(ROWS), columns, generator=generator).bfloat16()
        for what, found, expected in _results(kernel, format, values, x):
            if not torch.equal(found, expected):
                return f"{what} of {format} weights differs from the reference"
    from splitrun.kernels.cpu.selftest_layer import layer_fault

    return layer_fault(kernel)


def _results(
    kernel: Kernel, format: str, values: torch.Tensor, x: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    from splitrun.kernels.cpu.dense import DenseWeight
    from splitrun.kernels.cpu.tiled import TiledWeight

    if format == "nf4":
        codes, scales = quantize_nf4(values)
        integers = nf4_codes(codes)
        plain: Nf4Weight | Int8Weight = Nf4Weight(codes, scales, torch.bfloat16)
        expected = dequantize_reference(codes, scales, torch.tensor(NF4_TABLE), torch.bfloat16)
    else:
        codes, scales = quantize_int8(values)
        integers = codes.long()
        plain = Int8Weight(codes, scales, torch.bfloat16)
        expected = plain.dequantize()
    weight = TiledWeight.empty(format, values.shape, torch.bfloat16, kernel)
    weight.store(0, values)
    yield "quantization", _reference(weight.plain()), expected
    weight = TiledWeight.of(plain, kernel)
    yield "the value", weight.dequantize(), expected
    for rows in ROWS:
        yield (
            f"the product of {rows} rows",
            weight.apply(x[:rows]),
            product_reference(x[:rows], integers, scales, format),
        )
    found = weight.largest(x)
    assert found is not None
    yield "the largest product", found[1], product_reference(x, integers, scales, format).float().max(-1).indices
    for dtype in (torch.bfloat16, torch.float16):
        dense, narrow = values.to(dtype), x.to(dtype)
        product, expected = DenseWeight(dense, kernel).apply(narrow), dense_reference(narrow, dense)
        if kernel.dots and dtype == torch.bfloat16:
            exact = narrow.double() @ dense.double().T
            within = (product.double() - exact).abs() <= many_bound(narrow, dense, exact)
            product = torch.where(within, expected, product)
        yield f"the {dtype} product beside that", product, expected


def _reference(plain: Nf4Weight | Int8Weight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The values by definition. An nf4 weight's own `dequantize` imports bitsandbytes: seconds, and 180 MB."""
    if isinstance(plain, Nf4Weight):
        return dequantize_reference(plain.packed, plain.maxima, torch.tensor(NF4_TABLE), dtype)
    return Int8Weight(plain.codes, plain.scales, dtype).dequantize()


MANY_ROWS = 37
WIDE_SHAPES = (("nf4", 1088), ("int8", 1060))
"""Two slabs and a short one."""


def first_fault_of_many(kernel: ManyRows) -> str | None:
    """What differs from the reference first in products of many rows, None when nothing does."""
    from splitrun.kernels.cpu.library import kernel as few_rows
    from splitrun.kernels.cpu.tiled import TiledWeight

    few = few_rows()
    if few is None:
        return "there is no kernel for few rows"
    generator = torch.Generator().manual_seed(8)
    for format, columns in WIDE_SHAPES:
        values = torch.randn(75, columns, generator=generator)
        x, bias = (torch.randn(rows, columns, generator=generator).bfloat16() for rows in (MANY_ROWS, 1))
        weight = TiledWeight.empty(format, values.shape, torch.bfloat16, few)
        weight.store(0, values)
        plain, bias = weight.plain(), bias[0, :75].contiguous()
        found = torch.empty(MANY_ROWS, 75, dtype=torch.bfloat16)
        kernel.product(weight.matrix, x, found, bias)
        if kernel.kind in ("int8", "int16"):
            most = Codes() if kernel.kind == "int8" else WIDE
            codes = nf4_codes(plain.packed, most.table) if isinstance(plain, Nf4Weight) else plain.codes.long()
            scales = plain.maxima if isinstance(plain, Nf4Weight) else plain.scales
            right = torch.equal(found, product_reference(x, codes, scales, format, bias, kernel.span, most))
        else:
            values = _reference(plain, torch.bfloat16 if kernel.kind == "bf16" else torch.float32)
            exact = x.double() @ values.double().T + bias.double()
            right = bool(((found.double() - exact).abs() <= many_bound(x, values, exact)).all())
        if not right:
            return f"the product of {MANY_ROWS} rows of {format} weights differs from the reference"
    return None
