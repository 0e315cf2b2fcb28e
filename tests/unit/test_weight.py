"""A Weight stands where a Parameter stood: modules, torch functions, attributes; and weights of no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitrun.kernels.formats import quantize
from splitrun.kernels.weight import Weight, install
from splitrun.kernels.zero import ZeroWeight


def quantized(*shape: int, format: str = "int8") -> Weight:
    torch.manual_seed(1)
    weight = quantize(torch.randn(shape), format, torch.float32)
    assert isinstance(weight, Weight)
    return weight


CALLS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "linear": ((32, 64), lambda w: functional.linear(torch.ones(2, 64), w)),
    "linear with bias": ((32, 64), lambda w: functional.linear(torch.ones(2, 64), w, torch.ones(32))),
    "linear by keyword": ((32, 64), lambda w: functional.linear(input=torch.ones(2, 64), weight=w)),
    "embedding": ((32, 64), lambda w: functional.embedding(torch.tensor([[1, 5]]), w)),
    "embedding with padding": ((32, 64), lambda w: functional.embedding(torch.tensor([1]), w, padding_idx=0)),
    "matmul": ((32, 64), lambda w: torch.ones(2, 32) @ w),
    "matmul from the left": ((32, 64), lambda w: w @ torch.ones(64, 3)),
    "matmul of the transpose": ((32, 64), lambda w: torch.ones(2, 64) @ w.t()),
    "addmm": ((32, 64), lambda w: torch.addmm(torch.ones(64), torch.ones(2, 32), w)),
    "bmm": ((4, 32, 64), lambda w: torch.bmm(torch.ones(4, 2, 32), w)),
    "batched matmul of the transpose": ((4, 32, 64), lambda w: torch.ones(4, 2, 64) @ w.transpose(1, 2)),
    "einsum": ((4, 32, 64), lambda w: torch.einsum("eio,bo->bei", w, torch.ones(2, 64))),
    "one entry": ((4, 32, 64), lambda w: functional.linear(torch.ones(2, 64), w[2])),
    "each entry": ((4, 32, 64), lambda w: torch.cat([functional.linear(torch.ones(1, 64), one) for one in w])),
    "gathered entries": ((4, 32, 64), lambda w: torch.bmm(torch.ones(3, 1, 32), w[torch.tensor([0, 3, 3])])),
    "scaled": ((32, 64), lambda w: torch.ones(2, 32) @ (w * 2.0)),
    "cast": ((32, 64), lambda w: functional.linear(torch.ones(2, 64).double(), w.to(torch.float64))),
    "concatenated": ((32, 64), lambda w: torch.ones(2, 64) @ torch.cat([w, w]).t()),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_use_sees_the_dequantized_values(name: str) -> None:
    shape, call = CALLS[name]
    weight = quantized(*shape)
    with torch.inference_mode():
        expected = call(weight.dequantize())
        torch.testing.assert_close(call(weight), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_a_weight_of_no_memory_gives_zeros_of_that_shape(name: str) -> None:
    shape, call = CALLS[name]
    weight = ZeroWeight(shape, torch.float32)
    assert weight.nbytes == 0
    found, expected = call(weight), call(torch.zeros(shape))
    assert isinstance(found, Tensor)
    assert found.shape == expected.shape
    if "bias" not in name and name != "addmm":
        assert torch.equal(found, expected)


def test_a_weight_of_no_memory_multiplies_nothing() -> None:
    """A product of a petabyte: only possible when nothing is stored or multiplied."""
    weight = ZeroWeight((10**6, 10**9), torch.bfloat16)
    assert (torch.zeros(1, 10**6, dtype=torch.bfloat16).expand(2, -1) @ weight[:, :4]).shape == (2, 4)
    stack = ZeroWeight((1000, 10**6, 10**6), torch.bfloat16)
    assert stack.transpose(1, 2)[3].shape == (10**6, 10**6)
    assert stack[torch.tensor([1, 2, 3])].shape == (3, 10**6, 10**6)
    assert functional.linear(torch.zeros(2, 10**6), ZeroWeight((7, 10**6), torch.float32)).shape == (2, 7)


class Twice(nn.Embedding):
    """An embedding that scales, as Gemma's does."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_modules_run_with_an_installed_weight(format: str) -> None:
    from transformers.pytorch_utils import Conv1D

    cases = [
        (nn.Linear(64, 128), torch.randn(2, 3, 64)),
        (nn.Linear(64, 128, bias=False), torch.randn(3, 64)),
        (Conv1D(128, 64), torch.randn(2, 3, 64)),
        (Twice(50, 64), torch.tensor([[1, 49], [0, 3]])),
    ]
    for module, x in cases:
        weight = quantize(module.weight.detach(), format, torch.float32)
        assert isinstance(weight, Weight)
        with torch.inference_mode():
            module.weight.copy_(weight.dequantize())
            expected = module(x)
            install(module, "weight", weight)
            assert "weight" not in dict(module.named_parameters())
            assert module.weight is weight
            torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)


def test_moving_and_casting_a_module_leaves_its_weights_alone() -> None:
    module = nn.Sequential(nn.Linear(64, 64))
    weight = quantized(64, 64)
    install(module, "0.weight", weight)
    module.to(torch.bfloat16)
    assert module[0].weight is weight


def test_installing_tensors() -> None:
    module = nn.BatchNorm1d(4)
    install(module, "weight", torch.full((4,), 3.0))
    install(module, "running_mean", torch.full((4,), 2.0))
    assert isinstance(module.weight, nn.Parameter)
    assert not module.weight.requires_grad
    assert "running_mean" in dict(module.named_buffers())
    assert module.running_mean[0] == 2
    install(module, "weight", quantized(4, 64))
    install(module, "weight", torch.zeros(4))
    assert [name for name, _ in module.named_parameters()] == ["bias", "weight"]


def test_attributes_as_of_a_tensor() -> None:
    weight = quantized(32, 64)
    assert weight.size() == (32, 64)
    assert (weight.size(1), weight.numel(), weight.dim()) == (64, 2048, 2)
    assert weight.data is weight
    assert weight.detach().contiguous() is weight
    assert weight.to(torch.float32) is weight
    assert weight.to("cpu").shape == (32, 64)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(weight.T, weight.dequantize().T)
    assert torch.equal(weight[:, 3], weight.dequantize()[:, 3])
    assert not hasattr(weight, "_no_such_thing")
    assert "int8" in repr(weight)
