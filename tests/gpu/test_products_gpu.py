"""The compiled products on a card: used for every format, right, and a row's bits its own."""

from __future__ import annotations

import pytest
import torch

from splitrun.kernels.gpu import direct
from splitrun.kernels.gpu.matrix import DENSE, INT8, NF4, AnyWeight, matrix_of
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda:0")
OUTPUTS = 20_000
"""Rows of each of two weights: several tiles for each team on any card."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [DENSE, INT8, NF4])
@pytest.mark.parametrize("columns", [320, 1536])
def test_products_of_many_tiles(format: int, dtype: torch.dtype, columns: int) -> None:
    if torch.cuda.get_device_capability(DEVICE) < direct.LEAST_CAPABILITY:
        pytest.skip("these cards have Triton's products")
    products = direct.direct_products(format, dtype, DEVICE)
    assert products is not None, "compiled and tested"
    generator = torch.Generator(DEVICE).manual_seed(columns)
    weights: list[AnyWeight] = []
    exact = []
    for _ in range(2):
        values = torch.randn(OUTPUTS, columns, generator=generator, device=DEVICE)
        if format == DENSE:
            weights.append(values.to(dtype))
            exact.append(values.to(dtype).double())
            continue
        weight = (Nf4Weight if format == NF4 else Int8Weight).empty(values.shape, dtype, DEVICE)
        weight.store(0, values)
        weights.append(weight)
        exact.append(weight.dequantize().double())
    matrix = matrix_of(weights)
    assert matrix is not None
    assert direct.takes(matrix)
    x = torch.randn(16, columns, generator=generator, device=DEVICE).to(dtype)
    wanted = x.double() @ torch.cat(exact).T
    gate, up = wanted.chunk(2, 1)
    for gated, right in ((False, wanted), (True, torch.nn.functional.silu(gate) * up)):
        found = {}
        for rows in (16, 1, 2, 8, 9, 13):
            found[rows] = torch.full((rows, right.shape[1]), torch.nan, dtype=dtype, device=DEVICE)
            products(x[:rows], matrix, found[rows], None, None, gated)
            assert found[rows].view(torch.int16).equal(found[16][:rows].view(torch.int16)), (rows, gated)
        assert float((found[16].double() - right).norm() / right.norm()) < direct.TOLERANCE
