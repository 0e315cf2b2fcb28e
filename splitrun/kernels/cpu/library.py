"""The compiled kernels: found, joined to torch's threads, tested on this machine, or absent.

The library has no threads of its own: it runs on the OpenMP runtime that torch has loaded, with as many threads as
torch would use in the calling thread. Environment: ``SPLITRUN_CPU_KERNELS`` names a level (``avx2``) or ``none``.
Knows pointers and sizes, neither formats' definitions nor models.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import threading
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from splitrun.kernels.cpu.arena import Arena
from splitrun.kernels.cpu.settings import LEVEL_VARIABLE, check_settings

LIBRARY = "_native"
FORMATS = {"nf4": 0, "int8": 1, "bf16": 2, "fp16": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_ROWS = 16
"""Rows of activations that a product takes."""


class Matrix(ctypes.Structure):
    """A weight as the library sees it: addresses of codes and scales in its layout, rows, columns, format."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


class _Scratch(threading.local):
    """Memory that a thread's calls use again and again; it only grows."""

    memory: Tensor | None = None

    def address(self, nbytes: int) -> int:
        if self.memory is None or self.memory.nbytes < nbytes:
            self.memory = None
            self.memory = Arena().empty(nbytes, torch.uint8)  # prompts need megabytes: on huge pages, where there are
        return self.memory.data_ptr()


_scratch = _Scratch()


def scratch_address(nbytes: int) -> int:
    """Address of this thread's memory for a call, at least that large. Its contents are whatever the last call left."""
    return _scratch.address(nbytes)


class Kernel:
    """The library at one instruction set level. Tensors are on the CPU and contiguous; nothing is checked in C.

    ``dots``: products with bf16 matrices are within `reference.many_bound`; else they are the reference's bits.
    """

    def __init__(self, library: ctypes.CDLL, level: int, name: str) -> None:
        self.name = name
        self._library = library
        self._level = level
        self.dots = bool(library.splitrun_level_dots(level))
        self._product = library.splitrun_product
        self._layers = library.splitrun_layers
        self._scratch_bytes = cache(library.splitrun_scratch_bytes)
        self._layers_scratch_bytes = library.splitrun_layers_scratch_bytes

    def product(self, weight: Matrix, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """Write ``x @ weight.T + bias`` to out. Shape: (1 to 16, columns) -> (same, weight rows), one dtype."""
        rows = x.shape[0]
        self._product(
            self._level,
            ctypes.addressof(weight),
            x.data_ptr(),
            DTYPES[x.dtype],
            rows,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            _scratch.address(self._scratch_bytes(rows, weight.columns)),
            torch.get_num_threads(),
        )

    def choose(self, weight: Matrix, x: Tensor) -> tuple[Tensor, Tensor]:
        """Per row of what `product` gives, the largest value and the lowest index that has it.

        NaN counts as largest. Shape: (1 to 16, columns) -> fp32 (same,), int64 (same,).
        """
        rows, threads = x.shape[0], torch.get_num_threads()
        values, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._library.splitrun_choose(
            self._level,
            ctypes.addressof(weight),
            x.data_ptr(),
            DTYPES[x.dtype],
            rows,
            values.data_ptr(),
            ids.data_ptr(),
            _scratch.address(self._library.splitrun_choose_scratch_bytes(rows, weight.columns, threads)),
            threads,
        )
        return values, ids

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Rows divided by their root mean square, times a vector, rounded once. Shape: (..., columns), one dtype."""
        out = torch.empty_like(x)
        columns = x.shape[-1]
        self._library.splitrun_norm(
            self._level,
            x.data_ptr(),
            weight.data_ptr(),
            DTYPES[x.dtype],
            x.numel() // columns,
            columns,
            epsilon,
            out.data_ptr(),
            _scratch.address(4 * columns),
        )
        return out

    def values(self, weight: Matrix, first: int, out: Tensor) -> None:
        """Write the values of rows from first on, as many as out has. Shape: (count, columns)."""
        self._values(weight, None, first, out)

    def gather(self, weight: Matrix, ids: Tensor, out: Tensor) -> None:
        """Write the values of some rows. Shape: int64 (count,) -> (count, columns). Raises IndexError."""
        self._values(weight, ids.data_ptr(), 0, out)

    def _values(self, weight: Matrix, ids: int | None, first: int, out: Tensor) -> None:
        status = self._library.splitrun_values(
            self._level,
            ctypes.addressof(weight),
            ids,
            first,
            out.shape[0],
            DTYPES[out.dtype],
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if status:
            raise IndexError(f"a row is out of range for a weight of {weight.rows} rows")

    def pack(self, weight: Matrix, first: int, codes: Tensor, scales: Tensor) -> None:
        """Set rows from first on from plain storage. Shape: (count, bytes of a row), fp32 (count, scales of a row)."""
        self._check_range(weight, first, codes)
        self._library.splitrun_pack(
            ctypes.addressof(weight), first, codes.shape[0], codes.data_ptr(), scales.data_ptr()
        )

    def unpack(self, weight: Matrix, first: int, codes: Tensor, scales: Tensor) -> None:
        """Get rows from first on into plain storage, as `pack` takes it. Modifies codes and scales."""
        self._check_range(weight, first, codes)
        self._library.splitrun_unpack(
            ctypes.addressof(weight), first, codes.shape[0], codes.data_ptr(), scales.data_ptr()
        )

    def quantize(self, weight: Matrix, first: int, values: Tensor) -> None:
        """Set rows from first on to the nearest values of the format. Shape: (count, columns), of a type in DTYPES."""
        self._check_range(weight, first, values)
        self._library.splitrun_quantize(
            ctypes.addressof(weight),
            first,
            values.shape[0],
            values.data_ptr(),
            DTYPES[values.dtype],
            torch.get_num_threads(),
        )

    @staticmethod
    def _check_range(weight: Matrix, first: int, rows: Tensor) -> None:
        if first < 0 or first + rows.shape[0] > weight.rows:
            raise IndexError(f"rows {first} to {first + rows.shape[0]} are out of range for {weight.rows} rows")

    def layers(
        self,
        blocks: ctypes.Array[ctypes.c_void_p],
        rows: ctypes.Array[ctypes.c_void_p],
        hidden: Tensor,
        cosines: Tensor,
        sines: Tensor,
        out: Tensor,
    ) -> None:
        """Run decoder layers, and rows, whose structures lie at these addresses. Shape: (tokens, hidden) -> same."""
        threads = torch.get_num_threads()
        self._layers(
            self._level,
            blocks,
            rows,
            len(blocks),
            hidden.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            out.data_ptr(),
            _scratch.address(self._layers_scratch_bytes(blocks, rows, len(blocks), threads)),
            threads,
        )

    def read(self, memory: Tensor) -> None:
        """Read memory with all threads and do nothing with it: the speed that the others are held against."""
        self._library.splitrun_read(memory.data_ptr(), memory.nbytes, torch.get_num_threads())


def library_path() -> Path | None:
    """Where the compiled library lies, None when it was not built."""
    candidates = (Path(__file__).with_name(LIBRARY + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def levels() -> dict[str, Kernel]:
    """Every level that this build has and this processor runs, untested, best first; empty without a library."""
    library = _load()
    found: dict[str, Kernel] = {}
    while library is not None and (level := library.splitrun_level(len(found))):
        name = library.splitrun_level_name(level).decode()
        found[name] = Kernel(library, level, name)
    return found


@cache
def kernel() -> Kernel | None:
    """The best level that gives exactly the reference's results on this machine; None: use torch.

    A level that fails is left out with one warning. Raises InvalidRequest where ``SPLITRUN_CPU_KERNELS`` names nothing.
    """
    from splitrun.kernels.cpu.selftest import first_fault

    check_settings()
    wanted = os.environ.get(LEVEL_VARIABLE)
    for name, candidate in levels().items():
        if wanted not in (None, "", name):
            continue
        fault = first_fault(candidate)
        if fault is None:
            return candidate
        warnings.warn(
            f"the {name} kernels are switched off: {fault}. splitrun goes on without them; please report this "
            "processor's name",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def native() -> ctypes.CDLL | None:
    """The library with its signatures declared and joined to torch's threads; None: it was not built, or otherwise."""
    return _load()


@cache
def _load() -> ctypes.CDLL | None:
    path = library_path()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    pointer, wide, narrow = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "splitrun_level": (pointer, (narrow,)),
        "splitrun_level_name": (ctypes.c_char_p, (pointer,)),
        "splitrun_level_dots": (narrow, (pointer,)),
        "splitrun_scratch_bytes": (wide, (wide, wide)),
        "splitrun_use_openmp": (None, (pointer, pointer)),
        "splitrun_pack": (None, (pointer, wide, wide, pointer, pointer)),
        "splitrun_unpack": (None, (pointer, wide, wide, pointer, pointer)),
        "splitrun_quantize": (None, (pointer, wide, wide, pointer, narrow, narrow)),
        "splitrun_product": (None, (pointer, pointer, pointer, narrow, narrow, pointer, pointer, pointer, narrow)),
        "splitrun_choose_scratch_bytes": (wide, (wide, wide, narrow)),
        "splitrun_choose": (None, (pointer, pointer, pointer, narrow, narrow, *[pointer] * 3, narrow)),
        "splitrun_values": (narrow, (pointer, pointer, pointer, wide, wide, narrow, pointer, narrow)),
        "splitrun_norm": (None, (*[pointer] * 3, narrow, wide, wide, ctypes.c_float, pointer, pointer)),
        "splitrun_layers_scratch_bytes": (wide, (pointer, pointer, narrow, narrow)),
        "splitrun_layers": (None, (pointer, pointer, pointer, narrow, *[pointer] * 5, narrow)),
        "splitrun_read": (ctypes.c_uint64, (pointer, wide, narrow)),
        "splitrun_many": (pointer, (narrow,)),
        "splitrun_many_name": (ctypes.c_char_p, (pointer,)),
        "splitrun_many_kind": (narrow, (pointer,)),
        "splitrun_many_span": (narrow, (pointer,)),
        "splitrun_has_tiles": (narrow, ()),
        "splitrun_chunk_scratch_bytes": (wide, (pointer, pointer, wide, wide)),
        "splitrun_chunk": (None, (*[pointer] * 9, narrow)),
        "splitrun_many_spin": (wide, (pointer, wide, narrow)),
        "splitrun_many_scratch_bytes": (wide, (pointer, wide, wide, wide)),
        "splitrun_many_product": (None, (*[pointer] * 3, narrow, wide, *[pointer] * 3, narrow)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            return None  # built from other sources: as good as not built
        function.restype, function.argtypes = result, arguments
    library.splitrun_use_openmp(*_openmp())
    return library


def _openmp() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel and omp_get_thread_num in the OpenMP runtime that torch itself uses.

    None: the kernels run on one thread. Asked of torch's own library, whose dependencies the search follows, so it is
    never a second runtime.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            runtime = ctypes.CDLL(str(folder / name))
            functions = (runtime.GOMP_parallel, runtime.omp_get_thread_num)
        except (OSError, AttributeError):
            continue
        region, number = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        return region, number
    return None, None
