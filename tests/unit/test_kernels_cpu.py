"""Compiled products and values against the reference, at every instruction set level that this processor runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from native_library import compiled_levels
from torch import Tensor
from torch.nn import functional

from splitrun.__main__ import main
from splitrun.child import child_environment
from splitrun.kernels.cpu import library
from splitrun.kernels.cpu.dense import DenseWeight
from splitrun.kernels.cpu.library import Kernel
from splitrun.kernels.cpu.reference import (
    dense_reference,
    many_bound,
    nf4_codes,
    product_reference,
    quantize_activations,
)
from splitrun.kernels.cpu.selftest import first_fault
from splitrun.kernels.cpu.settings import LEVEL_VARIABLE
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.kernels.formats import QUANTIZED, quantize
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE, dequantize_reference

LEVELS = list(compiled_levels()) or [pytest.param("none", marks=pytest.mark.skip(reason="nothing is compiled here"))]
SHAPES = {
    "nf4": [(1, 64), (16, 64), (17, 128), (33, 192), (100, 448), (257, 64)],
    "int8": [(1, 4), (16, 64), (17, 68), (33, 132), (100, 100), (3, 1000)],
}
pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [(format, *shape) for format, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture(params=LEVELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return compiled_levels()[request.param]


def pair(
    format: str, rows: int, columns: int, kernel: Kernel, dtype: torch.dtype = torch.bfloat16
) -> tuple[Nf4Weight | Int8Weight, TiledWeight]:
    """A plain weight and the same in the kernels' layout."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    plain = QUANTIZED[format].plain.empty(values.shape, dtype, "cpu")
    plain.store(0, values)
    return plain, TiledWeight.of(plain, kernel)


def integers(plain: Nf4Weight | Int8Weight) -> tuple[Tensor, Tensor]:
    if isinstance(plain, Nf4Weight):
        return nf4_codes(plain.packed), plain.maxima
    return plain.codes.long(), plain.scales


def activations(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 2) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("format", "outputs", "columns"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_1_to_16_rows_are_the_references_bits(
    format: str, outputs: int, columns: int, dtype: torch.dtype, kernel: Kernel
) -> None:
    plain, weight = pair(format, outputs, columns, kernel, dtype)
    x, bias = activations(16, columns, dtype), activations(1, outputs, dtype, seed=3)[0]
    codes, scales = integers(plain)
    expected = product_reference(x, codes, scales, format, bias)
    for rows in range(1, 17):
        found = weight.apply(x[:rows], bias=bias)
        assert torch.equal(found, expected[:rows]), f"{rows} rows"
    assert torch.equal(weight.apply(x[:3]), product_reference(x[:3], codes, scales, format))


@pytest.mark.parametrize("format", SHAPES)
def test_a_row_depends_on_no_other_row(format: str, kernel: Kernel) -> None:
    _, weight = pair(format, 45, 192, kernel)
    x = activations(16, 192)
    alone = torch.cat([weight.apply(row.view(1, -1)) for row in x])
    assert torch.equal(weight.apply(x), alone)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(weight.apply(x[order]), alone[order])
    x[3:] = torch.nan
    assert torch.equal(weight.apply(x)[:3], alone[:3])


@pytest.mark.parametrize("format", SHAPES)
def test_the_largest_is_what_a_search_finds(format: str, kernel: Kernel) -> None:
    """Ties go to the lowest index, NaN beats everything, threads change nothing."""
    plain, weight = pair(format, 203, 128, kernel)
    for row in (17, 90, 140):  # equal matrix rows: equal logits
        values = plain.dequantize()[150:151].float()
        weight.store(row, values)
        weight.store(150, values)
    x = activations(16, 128)
    x[3] = 5 * weight.dequantize()[150]
    x[4], x[5, 0] = 0, torch.nan
    for threads, rows in ((1, 16), (3, 16), (2, 7), (7, 6)):
        torch.set_num_threads(threads)
        expected = weight.apply(x[:rows]).float().max(dim=-1)
        found = weight.largest(x[:rows])
        assert found is not None
        assert torch.equal(found[0].nan_to_num(7), expected.values.nan_to_num(7))
        assert torch.equal(found[1][:5], expected.indices[:5])
        assert found[1][3] == 17
        assert found[1][4] == 0
    assert weight.largest(x.float()) is None
    assert weight.largest(torch.cat([x, x])) is None


@pytest.mark.parametrize("format", SHAPES)
def test_threads_change_no_bit(format: str, kernel: Kernel) -> None:
    _, weight = pair(format, 1003, 512, kernel)
    x, found = activations(5, 512), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(weight.apply(x))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(("format", "outputs", "columns"), CASES)
def test_values_are_the_formats_own(format: str, outputs: int, columns: int, kernel: Kernel) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        plain, weight = pair(format, outputs, columns, kernel, dtype)
        expected = plain.dequantize()
        assert torch.equal(weight.dequantize(), expected)
        ids = torch.tensor([[0, outputs - 1], [outputs // 2, -1]])
        assert torch.equal(weight.rows(ids), expected[ids])
        assert weight.nbytes == plain.nbytes == QUANTIZED[format].stored_bytes((outputs, columns))


@pytest.mark.parametrize("format", SHAPES)
def test_values_of_every_code_and_of_extreme_scales(format: str, kernel: Kernel) -> None:
    plain, _ = pair(format, 32, 512, kernel)
    if isinstance(plain, Nf4Weight):
        plain.packed.copy_(torch.arange(256, dtype=torch.int32).to(torch.uint8).expand(32, 256))
        plain.maxima.copy_(torch.logspace(-44, 37, plain.maxima.numel()).view_as(plain.maxima))
    else:
        plain.codes.copy_(torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).repeat(64).view(32, 512))
        plain.scales.copy_(torch.logspace(-44, 35, 32))
    for dtype in (torch.bfloat16, torch.float16):
        plain.dtype = dtype
        if isinstance(plain, Nf4Weight):
            expected = dequantize_reference(plain.packed, plain.maxima, torch.tensor(NF4_TABLE), dtype)
        else:
            expected = plain.dequantize()
        assert torch.equal(TiledWeight.of(plain, kernel).dequantize(), expected)
    if isinstance(plain, Int8Weight):  # -128 never comes from quantizing, but may lie in a checkpoint
        plain.scales.fill_(0.01)
        plain.dtype = torch.bfloat16
        x = torch.full((2, 512), -3.0).bfloat16()
        expected = product_reference(x, plain.codes.long(), plain.scales, "int8")
        assert torch.equal(TiledWeight.of(plain, kernel).apply(x), expected)


@pytest.mark.parametrize("format", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantizing_into_the_layout_is_quantizing(format: str, dtype: torch.dtype, kernel: Kernel) -> None:
    values = torch.randn(83, 256, generator=torch.Generator().manual_seed(4)).to(dtype) * 0.05
    values[3], values[4, :64], values[5, 7] = 0, 1e-7, 3
    plain = QUANTIZED[format].plain.empty(values.shape, torch.bfloat16, "cpu")
    weight = TiledWeight.empty(format, values.shape, torch.bfloat16, kernel)
    for start, stop in ((50, 83), (0, 7), (7, 50)):
        plain.store(start, values[start:stop])
        weight.store(start, values[start:stop])
    assert torch.equal(weight.plain().dequantize(), plain.dequantize())
    assert all(torch.equal(*pair) for pair in zip(integers(weight.plain()), integers(plain), strict=True))


@pytest.mark.parametrize("format", SHAPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_its_row(format: str, bad: float, kernel: Kernel) -> None:
    _, weight = pair(format, 40, 128, kernel)
    x = activations(3, 128)
    x[1, 77] = bad
    found = weight.apply(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("format", SHAPES)
def test_tiny_huge_and_zero_activations(format: str, kernel: Kernel) -> None:
    plain, weight = pair(format, 20, 128, kernel)
    x = activations(4, 128) * torch.tensor([[0.0], [1e-38], [1e30], [1e-20]]).bfloat16()
    codes, scales = integers(plain)
    assert torch.equal(weight.apply(x), product_reference(x, codes, scales, format))
    assert (weight.apply(x)[:2] == 0).all()
    assert weight.apply(x).isfinite().all()


@pytest.mark.parametrize("format", SHAPES)
def test_the_stated_error_bound_holds(format: str, kernel: Kernel) -> None:
    plain, weight = pair(format, 64, 512, kernel)
    x = activations(8, 512)
    x[0, ::64] = 30  # outliers make their groups coarse
    values = TiledWeight.of(plain, kernel).plain().dequantize().double()
    exact = x.double() @ values.T
    groups_x, groups_w = x.double().view(8, -1, 64), values.view(64, -1, 64)
    bound = (groups_x.abs().amax(-1) / 254) @ groups_w.abs().sum(-1).T
    if format == "nf4":
        bound = bound + (groups_x.abs().sum(-1) @ (groups_w.abs().amax(-1) / 254).T) * (1 + 1 / 127)
    error = (weight.apply(x).double() - exact).abs()
    assert (error <= bound + exact.abs() * 2**-8 + 1e-3).all()
    assert (error[1:].norm() / exact[1:].norm()).item() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (16, 64), (37, 100), (17, 259)])
def test_products_with_plain_matrices_are_the_references(
    outputs: int, columns: int, dtype: torch.dtype, kernel: Kernel
) -> None:
    values, x, bias = (
        activations(outputs, columns, dtype, 8),
        activations(16, columns, dtype),
        activations(1, outputs)[0],
    )
    x[3, 0], x[5, columns - 1], values[-1, 0] = torch.nan, torch.inf, 1e-7
    weight = DenseWeight(values, kernel)
    expected = weight.apply(x, bias=bias)
    _require_reference(expected, x, values, bias, exact_bits=not (kernel.dots and dtype == torch.bfloat16))
    for rows in range(1, 17):
        assert torch.equal(weight.apply(x[:rows], bias=bias).nan_to_num(7), expected[:rows].nan_to_num(7)), rows
    assert torch.equal(weight.apply(x.repeat(2, 1)).isnan(), functional.linear(x.repeat(2, 1), values).isnan())
    half = outputs // 2 + 1
    assert torch.equal(weight.part(0, half).apply(x[:1]), weight.apply(x[:1])[:, :half])
    found = weight.largest(x[:3])
    assert found is not None
    assert torch.equal(found[1], weight.apply(x[:3]).float().max(-1).indices)
    assert weight.rows(torch.tensor([0])).equal(values[:1])
    with pytest.raises(ValueError, match="stays on the CPU"):
        weight.moved("meta")


def _require_reference(found: Tensor, x: Tensor, values: Tensor, bias: Tensor, exact_bits: bool) -> None:
    """A plain matrix's product is the reference's: its bits, or as near to the exact one as dot products promise."""
    expected = dense_reference(x, values, bias)
    if exact_bits:
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
        return
    numbers = expected.isfinite()
    assert torch.equal(found[~numbers].nan_to_num(7), expected[~numbers].nan_to_num(7))
    exact = x.double() @ values.double().T + bias.double()
    assert ((found.double() - exact).abs() <= many_bound(x, values, exact))[numbers].all()


def test_activation_codes_use_the_whole_range() -> None:
    codes, scales = quantize_activations(activations(4, 200, torch.float32), 1 / 127)
    assert codes.shape == (4, 4, 64)
    assert (codes.abs().amax(-1) == 127).all()
    restored = (codes * scales.unsqueeze(-1)).view(4, -1)
    assert (restored[:, :200] - activations(4, 200, torch.float32)).abs().max() < 0.02
    assert (codes[:, 3, 8:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_is_rounded_once_and_a_matter_of_its_row(dtype: torch.dtype, kernel: Kernel) -> None:
    x, weight = activations(5, 200).to(dtype), activations(1, 200).to(dtype)[0]
    x[3, 7] = torch.nan
    found = kernel.norm(x, weight, 1e-6)
    expected = torch.nn.functional.rms_norm(x.double(), (200,), weight.double(), 1e-6)
    unit = torch.finfo(dtype).eps
    assert ((found.double() - expected).abs() <= expected.abs() * unit + 1e-6)[[0, 1, 2, 4]].all()
    assert found[3].isnan().all()
    assert torch.equal(kernel.norm(x[2:3].contiguous(), weight, 1e-6), found[2:3])


@pytest.mark.parametrize("format", SHAPES)
def test_unaligned_memory(format: str, kernel: Kernel) -> None:
    plain, weight = pair(format, 37, 128, kernel)
    expected = weight.apply(activations(2, 128))
    memory = torch.empty(weight.codes.numel() + 1, dtype=torch.uint8)
    memory[1:] = weight.codes
    moved = TiledWeight(format, memory[1:], weight.scales, weight.shape, weight.dtype, kernel)
    x = torch.empty(2 * 128 + 1, dtype=torch.bfloat16)[1:].view(2, 128).copy_(activations(2, 128))
    assert torch.equal(moved.apply(x), expected)
    assert torch.equal(moved.dequantize(), plain.dequantize())


@pytest.mark.parametrize("format", SHAPES)
def test_many_rows_are_multiplied_with_the_exact_values(
    format: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitrun.kernels.cpu.tiled.SCRATCH_VALUES", 32 * 128)
    plain, weight = pair(format, 75, 128, kernel)
    x, bias = activations(17, 128), activations(1, 75)[0]
    torch.testing.assert_close(weight.apply(x, bias=bias), functional.linear(x, plain.dequantize(), bias))
    out = torch.empty(17, 75, dtype=torch.bfloat16)
    assert weight.apply(x, out) is out
    x = x.view(1, 17, 128)
    assert weight.apply(x).shape == (1, 17, 75)
    assert weight.apply(x[:, :0]).shape == (1, 0, 75)


@pytest.mark.parametrize("format", SHAPES)
def test_parts_entries_and_stacks(format: str, kernel: Kernel) -> None:
    plain, weight = pair(format, 75, 128, kernel)
    expected = plain.dequantize()
    for start, stop in ((16, 48), (64, 75), (0, 75), (3, 40), (16, 40), (5, 5)):
        assert torch.equal(weight.part(start, stop).dequantize(), expected[start:stop]), (start, stop)
    values = torch.randn(3, 32, 128, generator=torch.Generator().manual_seed(9))
    stack = TiledWeight.empty(format, values.shape, torch.bfloat16, kernel)
    stack.store(1, values[1:])
    stack.store(0, values[:1])
    separate = [quantize(entry, format, torch.float32).dequantize().bfloat16() for entry in values]
    assert torch.equal(stack.dequantize(), torch.stack(separate))
    assert torch.equal(stack[1].dequantize(), separate[1])
    assert torch.equal(stack[torch.tensor([2, 0])], torch.stack([separate[2], separate[0]]))
    assert torch.equal(stack[1:].dequantize(), torch.stack(separate[1:]))
    assert torch.equal(stack.plain().dequantize(), torch.stack(separate))


def test_rows_out_of_range_are_refused(kernel: Kernel) -> None:
    _, weight = pair("nf4", 20, 64, kernel)
    for ids in ([20], [-21], [0, 99]):
        with pytest.raises(IndexError):
            weight.rows(torch.tensor(ids))
    with pytest.raises(IndexError):
        weight.store(19, torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("format", "shape", "dtype", "takes"),
    [
        ("nf4", (20, 64), torch.bfloat16, True),
        ("nf4", (20, 64), torch.float32, False),
        ("nf4", (20, 32), torch.bfloat16, False),
        ("int8", (20, 68), torch.float16, True),
        ("int8", (20, 66), torch.float16, False),
        ("int8", (2, 16, 64), torch.bfloat16, True),
        ("int8", (2, 20, 64), torch.bfloat16, False),
        ("int8", (0, 64), torch.bfloat16, False),
        ("int8", (1, 2, 16, 64), torch.bfloat16, False),
    ],
)
def test_what_the_layout_takes(format: str, shape: tuple[int, ...], dtype: torch.dtype, takes: bool) -> None:
    assert TiledWeight.takes(format, shape, dtype, "cpu") is takes
    assert not TiledWeight.takes(format, shape, dtype, "meta")


def test_the_self_test_finds_a_wrong_kernel(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_fault(kernel) is None
    right = Kernel.product

    def wrong(self: Kernel, weight: library.Matrix, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        right(self, weight, x, out, bias)
        out[-1, -1] += 1

    monkeypatch.setattr(Kernel, "product", wrong)
    assert "the product of 1 rows of nf4" in (first_fault(kernel) or "")


def test_the_self_test_finds_a_wrong_layer(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernel.layers

    def wrong(self: Kernel, *arguments: Any) -> None:
        right(self, *arguments)
        arguments[-1].mul_(1.02)

    monkeypatch.setattr(Kernel, "layers", wrong)
    assert "a decoder layer is off by" in (first_fault(kernel) or "")


def test_a_failing_level_is_left_out_with_one_warning(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitrun.kernels.cpu.selftest.first_fault", lambda candidate: "it adds wrongly")
    monkeypatch.setattr(library, "levels", lambda: {kernel.name: kernel})
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    chosen = library.kernel.__wrapped__
    with pytest.warns(RuntimeWarning, match=f"the {kernel.name} kernels are switched off: it adds wrongly"):
        assert chosen() is None


def test_a_level_by_name_and_none(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = library.kernel.__wrapped__
    for value, expected in ((kernel.name, kernel.name), ("none", None)):
        monkeypatch.setenv(LEVEL_VARIABLE, value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = chosen()
        assert (None if found is None else found.name) == expected


THREADS = """
import torch
from splitrun.kernels.formats import quantize
torch.set_num_threads(2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
weight = quantize(torch.randn(4096, 1024), "nf4", torch.bfloat16)
weight.apply(torch.randn(1, 1024).bfloat16())
with open("/proc/self/maps") as maps:
    names = {line.split()[-1] for line in maps if "/" in line}
print(type(weight).__name__, *sorted(name for name in names if "omp" in name.rpartition("/")[2]))
"""


@pytest.mark.skipif(not compiled_levels(), reason="nothing is compiled here")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_in_the_process() -> None:
    command = [sys.executable, "-P", "-c", THREADS]  # the package under test, not a folder of that name
    run = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True, timeout=200)
    kind, *runtimes = run.stdout.split()
    assert kind == "TiledWeight"
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize(
    ("policy", "own", "expected"), [(None, None, "1000"), (None, "7", "7"), ("active", None, None)]
)
def test_idle_threads_spin_briefly(
    policy: str | None, own: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("OMP_WAIT_POLICY", policy), ("GOMP_SPINCOUNT", own)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    assert main(["--help"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected
