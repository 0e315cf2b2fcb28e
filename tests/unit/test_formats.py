"""nf4 and int8: values as bitsandbytes defines them, exact bytes, products, look-ups, slices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitrun.kernels import weight as weight_module
from splitrun.kernels.compiled import compiled_dequantize
from splitrun.kernels.formats import QUANTIZED, applied_format, covered, quantize, weight_bytes
from splitrun.kernels.int8 import Int8Weight, quantize_int8
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import CHUNK_VALUES, NF4_TABLE, dequantize_reference, quantize_nf4
from splitrun.kernels.weight import Weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (48, 192)) -> Tensor:
    """Random values with a block of zeros, a row of zeros and a block with one large value."""
    torch.manual_seed(3)
    values = torch.randn(shape) * 0.02
    values[1, ..., :64] = 0
    values[2] = 0
    values[3, ..., 50] = 9.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_bitsandbytes_bit_for_bit(dtype: torch.dtype) -> None:
    reference = pytest.importorskip("bitsandbytes.functional")
    values = matrix(dtype)
    packed, state = reference.quantize_4bit(values, blocksize=64, quant_type="nf4")
    own_packed, own_maxima = quantize_nf4(values)
    assert torch.equal(own_packed.view(-1), packed.view(-1))
    assert torch.equal(own_maxima.view(-1), state.absmax)
    for result in DTYPES:
        state.dtype = result
        expected = reference.dequantize_4bit(packed, state)
        assert torch.equal(Nf4Weight(own_packed, own_maxima, result).dequantize(), expected)
        plain = dequantize_reference(own_packed, own_maxima, torch.tensor(NF4_TABLE), result)
        assert torch.equal(plain, expected)


def test_nf4_in_chunks_equals_nf4_at_once() -> None:
    values = torch.randn(2 * CHUNK_VALUES // 128 + 1, 128)
    packed, maxima = quantize_nf4(values)
    table = torch.tensor(NF4_TABLE)
    scaled = values.view(-1, 64) / values.view(-1, 64).abs().amax(-1, keepdim=True)
    nearest = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).view(values.shape)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(values.shape)
    assert (codes != nearest).float().mean() < 1e-5, "only ties may differ"
    expected = (table[codes.long()].view(-1, 64) * maxima.view(-1, 1)).view(values.shape)
    assert torch.equal(dequantize_reference(packed, maxima, table, torch.float32), expected)


def test_nf4_on_and_beside_every_border() -> None:
    table = torch.tensor(NF4_TABLE)
    borders = (table[1:] + table[:-1]) / 2
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    values = torch.cat([borders, torch.nextafter(borders, up), torch.nextafter(borders, down), table])
    blocks = torch.zeros(len(values), 64)
    blocks[:, 0] = 1
    blocks[:, 1] = values
    packed, _ = quantize_nf4(blocks)
    expected = (values.unsqueeze(1) > borders).sum(1)
    assert torch.equal((packed[:, 0] & 15).long(), expected)


def test_the_compiled_code_is_trusted_only_where_it_agrees() -> None:
    packed, maxima = quantize_nf4(matrix())
    values = compiled_dequantize(packed, maxima, torch.float32)
    if values is not None:
        assert torch.equal(values, dequantize_reference(packed, maxima, torch.tensor(NF4_TABLE), torch.float32))
    assert compiled_dequantize(packed.to("meta"), maxima.to("meta"), torch.float32) is None


def test_int8_is_symmetric_per_row() -> None:
    values = matrix()
    codes, scales = quantize_int8(values)
    assert codes.abs().max() == 127
    largest = values.abs().amax(-1)
    torch.testing.assert_close(scales, largest / 127, rtol=1e-6, atol=0)
    error = (Int8Weight(codes, scales, torch.float32).dequantize() - values).abs()
    assert (error <= scales.unsqueeze(-1) * 0.501).all()
    assert (codes[2] == 0).all()
    assert scales[2] == 0


def test_int8_matches_llm_int8_within_one_step() -> None:
    """bitsandbytes rounds through fp16; both are 127 steps per row."""
    reference = pytest.importorskip("bitsandbytes.functional")
    values = matrix(torch.float16)
    expected, scales, _ = reference.int8_vectorwise_quant(values)
    codes, own = quantize_int8(values)
    assert (codes.int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(own * 127, scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("shape", [(48, 192), (4, 32, 64)])
def test_a_weight_and_its_dequantized_values_agree(format: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = quantize(matrix(torch.float32, shape), format, dtype)
    assert isinstance(weight, Weight)
    values = weight.dequantize()
    assert (weight.shape, weight.dtype, weight.ndim, len(weight)) == (values.shape, dtype, len(shape), shape[0])
    assert weight.nbytes == weight_bytes(shape, format)
    ids = torch.tensor([[3, 1, 1], [0, 2, 3]])
    assert torch.equal(weight.rows(ids), values[ids])
    assert torch.equal(weight[1:3].dequantize(), values[1:3])
    assert torch.equal(weight[torch.tensor([2, 0])], values[torch.tensor([2, 0])])
    one = weight[-1]
    assert torch.equal(one.dequantize() if isinstance(one, Weight) else one, values[-1])
    if len(shape) == 3:
        assert isinstance(one, Weight)
    with pytest.raises(IndexError):
        weight[shape[0]]
    assert torch.equal(weight.moved("cpu").dequantize(), values)


@pytest.mark.parametrize("format", QUANTIZED)
def test_storing_by_pieces_equals_storing_at_once(format: str) -> None:
    values = matrix()
    whole = quantize(values, format, torch.float32)
    pieces = QUANTIZED[format].empty(values.shape, torch.float32, "cpu")
    for start in range(0, 48, 10):
        pieces.store(start, values[start : start + 10])
    assert isinstance(whole, Weight)
    assert torch.equal(pieces.dequantize(), whole.dequantize())


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("limit", [1 << 22, 192 * 5])
def test_products_in_parts_equal_products_at_once(format: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weight_module.DEQUANTIZED_VALUES, "cpu", limit)
    weight = quantize(matrix(), format, torch.float32)
    assert isinstance(weight, Weight)
    x, bias = torch.randn(2, 3, 192), torch.randn(48)
    expected = functional.linear(x, weight.dequantize(), bias)
    torch.testing.assert_close(weight.apply(x, bias=bias), expected, rtol=1e-5, atol=1e-5)
    out = torch.empty(2, 3, 48)
    assert weight.apply(x, out=out, bias=bias) is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "format", "expected"),
    [
        ((128, 64), "nf4", "nf4"),
        ((128, 96), "nf4", None),
        ((128, 96), "int8", "int8"),
        ((64,), "int8", None),
        ((128, 64), "bf16", None),
        ((4, 128, 64), "nf4", "nf4"),
    ],
)
def test_what_a_format_applies_to(shape: tuple[int, ...], format: str, expected: str | None) -> None:
    assert applied_format(shape, format) == expected
    assert applied_format(shape, format, covered=False) is None


@pytest.mark.parametrize(
    ("shape", "format", "covered_", "expected"),
    [
        ((128, 64), "nf4", True, 4608),
        ((128, 64), "int8", True, 8704),
        ((128, 64), "bf16", True, 16384),
        ((128, 64), "fp32", True, 32768),
        ((128, 96), "nf4", True, 24576),
        ((64,), "nf4", True, 128),
        ((128, 64), "nf4", False, 16384),
    ],
)
def test_bytes(shape: tuple[int, ...], format: str, covered_: bool, expected: int) -> None:
    assert weight_bytes(shape, format, "bf16", covered_) == expected


def test_which_modules_are_covered() -> None:
    from transformers.pytorch_utils import Conv1D

    tokens, positions = nn.Embedding(100, 64), nn.Embedding(32, 64)
    stack = nn.Module()
    stack.stack = nn.Parameter(torch.zeros(4, 8, 64))
    cases = [
        (nn.Linear(64, 32), "weight", True),
        (nn.Linear(64, 32), "bias", False),
        (nn.Linear(64, 4), "weight", False),
        (nn.Linear(64, 1), "weight", False),
        (Conv1D(32, 64), "weight", True),
        (tokens, "weight", True),
        (positions, "weight", False),
        (nn.LayerNorm(64), "weight", False),
        (nn.Conv1d(4, 8, 64), "weight", False),
        (stack, "stack", True),
    ]
    for module, name, expected in cases:
        assert covered(module, name, getattr(module, name), {4}, tokens) is expected, (module, name)
