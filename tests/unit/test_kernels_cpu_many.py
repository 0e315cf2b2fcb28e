"""Products of many rows against the reference, in every arithmetic that this processor runs."""

from __future__ import annotations

import warnings

import pytest
import torch
from native_library import compiled_levels
from torch import Tensor
from torch.nn import functional

from splitrun.kernels.cpu import many
from splitrun.kernels.cpu.library import Matrix, kernel, native
from splitrun.kernels.cpu.many import ManyRows
from splitrun.kernels.cpu.reference import WIDE, Codes, many_bound, nf4_codes, product_reference
from splitrun.kernels.cpu.selftest import first_fault_of_many
from splitrun.kernels.cpu.settings import LEVEL_VARIABLE, LEVELS, PROMPT_KERNELS, PROMPT_VARIABLE
from splitrun.kernels.cpu.tiled import TiledWeight
from splitrun.kernels.formats import QUANTIZED
from splitrun.kernels.int8 import Int8Weight
from splitrun.kernels.nf4 import Nf4Weight
from splitrun.kernels.nf4_definition import NF4_TABLE, dequantize_reference

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = many.every() if compiled_levels() else {}
NAMES = list(KERNELS) or [pytest.param("none", marks=pytest.mark.skip(reason="no kernel for prompts runs here"))]
SHAPES = [("nf4", 1, 64), ("nf4", 75, 1088), ("nf4", 129, 192), ("int8", 1, 4), ("int8", 75, 1060), ("int8", 64, 100)]


@pytest.fixture(params=NAMES)
def each(request: pytest.FixtureRequest) -> ManyRows:
    return KERNELS[request.param]


def weight_of(format: str, outputs: int, columns: int, seed: int = 1) -> tuple[Nf4Weight | Int8Weight, TiledWeight]:
    fast = kernel()
    assert fast is not None
    values = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(seed))
    plain = QUANTIZED[format].plain.empty(values.shape, torch.bfloat16, "cpu")
    plain.store(0, values)
    return plain, TiledWeight.of(plain, fast)


def activations(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(dtype)


def product(each: ManyRows, weight: TiledWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype)
    each.product(weight.matrix, x, out, bias)
    return out


def largest_codes(each: ManyRows) -> Codes | None:
    """None: the kernel multiplies no integers."""
    return {"int8": Codes(), "int16": WIDE}.get(each.kind)


def integers(plain: Nf4Weight | Int8Weight, most: Codes) -> tuple[Tensor, Tensor]:
    if isinstance(plain, Nf4Weight):
        return nf4_codes(plain.packed, most.table), plain.maxima
    return plain.codes.long(), plain.scales


def values_in(each: ManyRows, plain: Nf4Weight | Int8Weight) -> Tensor:
    """What the kernel takes for the weight's values."""
    if each.kind == "bf16":
        return plain.dequantize()
    if isinstance(plain, Nf4Weight):
        return dequantize_reference(plain.packed, plain.maxima, torch.tensor(NF4_TABLE), torch.float32)
    return Int8Weight(plain.codes, plain.scales, torch.float32).dequantize()


@pytest.mark.parametrize(("format", "outputs", "columns"), SHAPES)
@pytest.mark.parametrize("rows", [17, 530])
def test_products_keep_to_the_reference(each: ManyRows, format: str, outputs: int, columns: int, rows: int) -> None:
    plain, weight = weight_of(format, outputs, columns)
    for dtype in (torch.bfloat16, torch.float16):
        if not each.takes(dtype):
            continue
        x, bias = activations(rows, columns, dtype), activations(1, outputs, dtype)[0]
        found = product(each, weight, x, bias)
        if (most := largest_codes(each)) is not None:
            expected = product_reference(x, *integers(plain, most), format, bias, each.span, most)
            assert torch.equal(found, expected)
        else:
            values = values_in(each, plain)
            exact = x.double() @ values.double().T + bias.double()
            # the bound's half unit in the last place is of bf16, which is coarser than fp16's
            assert ((found.double() - exact).abs() <= many_bound(x, values, exact)).all()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_same_for_any_rows_beside_it_and_any_threads(each: ManyRows, format: str) -> None:
    _, weight = weight_of(format, 200, 640)
    x = activations(70, 640)
    alone = product(each, weight, x)
    assert torch.equal(product(each, weight, x[3:40].contiguous()), alone[3:40])
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(product(each, weight, x), alone)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_its_row(each: ManyRows, bad: float) -> None:
    _, weight = weight_of("nf4", 70, 1088)
    x = activations(40, 1088)
    x[18, 1000] = bad
    found = product(each, weight, x)
    assert (~found[18].isfinite()).all()
    assert found[[*range(18), *range(19, 40)]].isfinite().all()


def test_unaligned_memory(each: ManyRows) -> None:
    fast = kernel()
    assert fast is not None
    _, weight = weight_of("nf4", 70, 192)
    x = activations(33, 192)
    expected = product(each, weight, x)
    storage = torch.empty(weight.codes.nbytes + 1, dtype=torch.uint8)[1:].copy_(weight.codes)
    moved = TiledWeight("nf4", storage, weight.scales, weight.shape, weight.dtype, fast)
    shifted = torch.empty(x.numel() + 1, dtype=torch.bfloat16)[1:].view_as(x).copy_(x)
    assert torch.equal(product(each, moved, shifted), expected)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_integers_of_16_bits_err_less_than_bf16_beside_outliers_too(each: ManyRows, format: str) -> None:
    if each.kind != "int16":
        pytest.skip("another arithmetic")
    plain, weight = weight_of(format, 64, 1536)
    values = values_in(each, plain).double()
    x = activations(32, 1536, torch.float16)
    x[:, 100] *= 100

    def error(product: Tensor) -> float:
        exact = x.double() @ values.T
        return float((product.double() - exact).norm() / exact.norm())

    in_bf16 = x.bfloat16().double() @ plain.dequantize().double().T
    assert error(product(each, weight, x)) < min(0.0005, error(in_bf16) / 2)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_error_of_int8_products_is_small_beside_outliers_less_so(each: ManyRows, format: str) -> None:
    if each.kind != "int8":
        pytest.skip("another arithmetic")
    plain, weight = weight_of(format, 64, 1536)
    x = activations(32, 1536)
    exact = x.double() @ plain.dequantize().double().T
    assert ((product(each, weight, x).double() - exact).norm() / exact.norm()).item() < 0.014
    x[:, 100] *= 100
    exact = x.double() @ plain.dequantize().double().T
    error = (product(each, weight, x).double() - exact).norm() / exact.norm()
    assert error.item() < (0.03 if each.span == 1 else 0.08)


@pytest.mark.skipif(not KERNELS, reason="no kernel for prompts runs here")
def test_weights_multiply_prompts_with_the_kernel_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, weight = weight_of("nf4", 75, 128)
    x, bias = activations(17, 128), activations(1, 75)[0]
    assert many.available().keys() <= KERNELS.keys()
    for name, one in many.available().items():
        monkeypatch.setenv(PROMPT_VARIABLE, name)
        assert torch.equal(weight.apply(x, bias=bias), product(one, weight, x, bias))
    monkeypatch.setenv(PROMPT_VARIABLE, "torch")
    torch.testing.assert_close(weight.apply(x, bias=bias), functional.linear(x, plain.dequantize(), bias))
    monkeypatch.setenv(PROMPT_VARIABLE, "bf16")
    chosen = many.many_rows()
    assert chosen is None or chosen.kind in ("bf16", "int16")


@pytest.mark.skipif(not KERNELS, reason="no kernel for prompts runs here")
def test_a_failing_kernel_is_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, name = many._chosen.__wrapped__, next(iter(KERNELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(name) is not None
    monkeypatch.setattr("splitrun.kernels.cpu.selftest.first_fault_of_many", lambda candidate: "it adds wrongly")
    with pytest.warns(RuntimeWarning, match=f"the {name} kernel for prompts is switched off: it adds wrongly"):
        assert chosen(name) is None


def test_the_self_test_finds_a_wrong_kernel(each: ManyRows, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_fault_of_many(each) is None
    right = ManyRows.product

    def wrong(self: ManyRows, weight: Matrix, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        right(self, weight, x, out, bias)
        out[-1, -1] += 1

    monkeypatch.setattr(ManyRows, "product", wrong)
    assert "37 rows of nf4" in (first_fault_of_many(each) or "")


LEVELS_HERE = list(compiled_levels())


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("wanted", ["bf16", "int8"])
def test_a_level_holds_for_prompts_too(level: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a kernel of a better level is named: the level's own is used then."""
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    monkeypatch.setattr(many, "kernel", lambda: compiled_levels()[level])
    monkeypatch.setattr(many, "_first_right", many._first_right.__wrapped__)
    names = [name for name in KERNELS if LEVELS.index(PROMPT_KERNELS[name]) >= LEVELS.index(level)]
    assert list(many.available()) == names
    monkeypatch.setattr(many, "_chosen", many._chosen.__wrapped__)
    chosen = many._chosen(wanted)
    kinds = [KERNELS[name].kind for name in names]
    serving = [name for name, kind in zip(names, kinds, strict=True) if kind in many.MEANT[wanted]]
    default = [name for name, kind in zip(names, kinds, strict=True) if kind in many.MEANT["bf16"]]
    expected = (serving or default or [None])[0]
    assert (chosen and chosen.name) == expected
    for name in KERNELS:
        named = many._chosen(name)
        assert (named and named.name) == (name if name in names else (default or [None])[0])
    for kernel_of_level in (chosen, many._first_right(many.ATTENTION)):
        assert kernel_of_level is None or kernel_of_level.name in names


def test_tile_instructions_are_used_where_there_are_any() -> None:
    library = native()
    if library is None or not library.splitrun_has_tiles():
        pytest.skip("no tile instructions here")
    assert {"amx-bf16", "amx-int8"} <= set(KERNELS)
    chosen = many.many_rows()
    assert chosen is not None
    assert chosen.name == "amx-bf16"
