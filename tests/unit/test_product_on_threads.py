"""The card's products, run on the processor: the very source, each thread of a block a thread of the system."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitrun.kernels.gpu import direct
from splitrun.kernels.gpu.matrix import DENSE, INT8, NF4, GpuMatrix, matrix_of
from splitrun.kernels.gpu.trial import largest_error, random_weights

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
SOURCE = Path(direct.__file__).with_name("source")
HERE = Path(__file__).with_name("on_threads")
KERNELS = ("plain_8", "plain_16", "gated_8", "gated_16")
CPU = torch.device("cpu")


class OnThreads:
    """`CudaKernels` on a processor."""

    folder: Path
    shared_bytes = 99 << 10

    def __init__(self, source: str, defines: dict[str, str | int], device: torch.device) -> None:
        machine = (SOURCE / "machine.cuh").read_text("utf-8")
        assert source.startswith(machine)
        parts = (HERE / "machine.h").read_text("utf-8"), source[len(machine) :], (HERE / "run.h").read_text("utf-8")
        file = self.folder / f"{defines['FORMAT']}_{defines['BF16']}.cpp"
        file.write_text("".join(f"#define {name} {value}\n" for name, value in defines.items()) + "".join(parts))
        target = file.with_suffix(".so")
        command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared", str(file), "-o"]
        subprocess.run([*command, str(target), "-pthread"], check=True)
        self._library = ctypes.CDLL(str(target))

    def launch(
        self, name: str, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        numbers = [ctypes.c_int(argument) for argument in arguments if isinstance(argument, int)]
        left = iter(numbers)
        places = [
            ctypes.addressof(next(left))
            if isinstance(argument, int)
            else None
            if argument is None
            else argument.data_ptr()
            for argument in arguments
        ]
        self._library.run(KERNELS.index(name), blocks, threads, shared_bytes, (ctypes.c_void_p * len(places))(*places))


class FewProcessors:
    """A card of three multiprocessors: teams compute tiles one after the other."""

    multi_processor_count = 3


@pytest.fixture(autouse=True)
def on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnThreads, "folder", tmp_path, raising=False)
    monkeypatch.setattr(direct, "CudaKernels", OnThreads)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FewProcessors())


def random_matrix(format: int, outputs: Sequence[int], columns: int) -> GpuMatrix:
    generator = torch.Generator().manual_seed(columns)
    found = matrix_of(random_weights(format, outputs, columns, torch.bfloat16, generator))
    assert found is not None
    assert direct.takes(found)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [DENSE, INT8, NF4])
def test_products_are_right_in_every_cut(format: int, dtype: torch.dtype) -> None:
    error = largest_error(direct.DirectProducts(format, dtype, CPU), format, dtype, CPU)
    assert error < (0.006 if dtype == torch.bfloat16 else 0.001)


@pytest.mark.parametrize("format", [DENSE, INT8, NF4])
def test_a_row_has_the_same_bits_in_any_company(format: int) -> None:
    products = direct.DirectProducts(format, torch.bfloat16, CPU)
    for outputs, columns in ((100, 320), (72, 1536)):
        matrix = random_matrix(format, (outputs, outputs), columns)
        x = torch.randn(16, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
        for gated in (False, True):
            found = {}
            for rows in (16, 1, 8, 9, 13):
                found[rows] = torch.full((rows, outputs * (1 if gated else 2)), torch.nan).bfloat16()
                products(x[:rows].contiguous(), matrix, found[rows], None, None, gated)
                assert found[rows].view(torch.int16).equal(found[16][:rows].view(torch.int16)), (rows, gated)
            assert found[16].isfinite().all()


def test_what_is_not_written_is_not_taken_for_right(monkeypatch: pytest.MonkeyPatch) -> None:
    products = direct.DirectProducts(NF4, torch.bfloat16, CPU)
    launch = OnThreads.launch

    def but_one(self: OnThreads, *asked: Any) -> None:
        out = asked[-1][11]
        before = out[:, -1].clone()
        launch(self, *asked)
        out[:, -1] = before

    monkeypatch.setattr(OnThreads, "launch", but_one)
    assert not largest_error(products, NF4, torch.bfloat16, CPU) < direct.TOLERANCE


def test_a_card_with_too_little_shared_memory_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnThreads, "shared_bytes", 48 << 10)
    with pytest.raises(direct.CudaUnavailable, match="48 KiB of shared memory"):
        direct.DirectProducts(NF4, torch.bfloat16, CPU)
