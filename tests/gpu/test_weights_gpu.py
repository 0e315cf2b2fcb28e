"""On a GPU: the same codes and values as on the CPU, products close to the dequantized ones, and whole models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from splitrun.kernels.compiled import compiled_dequantize, compiled_product
from splitrun.kernels.formats import QUANTIZED, quantize
from splitrun.kernels.int8 import Int8Weight, quantize_int8
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE, dequantize_reference, nf4_borders, quantize_nf4
from splitrun.kernels.weight import Weight

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def matrix() -> torch.Tensor:
    torch.manual_seed(5)
    values = torch.randn(300, 1536) * 0.02
    values[7] = 0
    values[9, 128] = 4.0
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", QUANTIZED)
def test_the_same_values_as_on_the_cpu(format: str, dtype: torch.dtype) -> None:
    here, there = quantize(matrix(), format, dtype), quantize(matrix().cuda(), format, dtype)
    assert isinstance(here, Weight)
    assert isinstance(there, Weight)
    assert torch.equal(here.dequantize(), there.dequantize().cpu())
    assert torch.equal(here.moved("cuda").dequantize().cpu(), here.dequantize())
    ids = torch.tensor([[0, 299], [7, 9]])
    assert torch.equal(there.rows(ids.cuda()).cpu(), here.rows(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_card_quantizes_bit_for_bit_as_defined(dtype: torch.dtype) -> None:
    values = (matrix().view(2, 150, 1536) * 2.0 ** torch.arange(-12, 12).repeat(64)).to(dtype)
    values[1, 3, 64:79], values[1, 3, 79:128] = nf4_borders(torch.device("cpu")).to(dtype), 1.0
    values[1, 5] = torch.arange(1536).fmod(255).sub(127).mul(0.5).to(dtype)  # halfway between two codes
    for start, part in ((0, values[:1]), (1, values[1:])):
        nf4 = Nf4Weight.empty(values.shape, dtype, "cuda")
        nf4.store(start, part.cuda())
        for found, expected in zip((nf4.packed, nf4.maxima), quantize_nf4(part), strict=True):
            assert torch.equal(found[start].cpu(), expected[0])
        int8 = Int8Weight.empty(values.shape, dtype, "cuda")
        int8.store(start, part.cuda())
        for found, expected in zip((int8.codes, int8.scales), quantize_int8(part), strict=True):
            assert torch.equal(found[start].cpu(), expected[0])


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", QUANTIZED)
def test_products(format: str, dtype: torch.dtype, rows: int) -> None:
    weight = quantize(matrix().cuda(), format, dtype)
    assert isinstance(weight, Weight)
    x, bias = torch.randn(rows, 1, 1536, device="cuda").to(dtype), torch.randn(300, device="cuda").to(dtype)
    expected = functional.linear(x.double(), weight.dequantize().double(), bias.double())
    found = functional.linear(x, weight, bias).double()
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert found.shape == (rows, 1, 300)
    assert (found - expected).norm() / expected.norm() < tolerance


def test_the_compiled_code_gives_the_defined_values() -> None:
    pytest.importorskip("bitsandbytes")
    packed, maxima = quantize_nf4(matrix().cuda())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = compiled_dequantize(packed, maxima, dtype)
        assert values is not None
        table = torch.tensor(NF4_TABLE, device="cuda")
        assert torch.equal(values, dequantize_reference(packed, maxima, table, dtype))
        assert compiled_product(torch.ones(1, 1536, device="cuda", dtype=dtype), packed, maxima) is not None


@pytest.mark.parametrize("format", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_models_loaded_onto_the_gpu(name: str, format: str, tmp_path: Path) -> None:
    from tiny_models import make_config, make_model, make_skeleton

    from splitrun.model.source import SafetensorsSource
    from splitrun.model.weights import Loader

    make_model(name).save_pretrained(tmp_path)
    ids = torch.arange(3, 27).view(2, 12)
    results = []
    for device in ("cpu", "cuda"):
        skeleton = make_skeleton(make_config(name))
        loader = Loader(skeleton, SafetensorsSource(tmp_path), torch.float32)
        names = list(skeleton.state_dict())
        assert loader.load(names, format, device).nbytes == loader.nbytes(names, format)
        for module in skeleton.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)
        with torch.inference_mode():
            results.append(skeleton(ids.to(device)).logits.cpu())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
