"""Products of many activation rows (prompts) with nf4 and int8 weights: which kernel runs here, and its call.

For more than 16 rows. A kernel's arithmetic is of one of four kinds: ``bf16`` multiplies the format's values rounded to
bf16 with bf16 activations; ``int16`` rounds both to integers of 16 bits, with a smaller error, and is faster except on
tiles; ``fp32`` rounds neither, for attention without products in bf16; ``int8`` rounds activations to int8 like the
products of few rows, about twice as fast, and is used only where asked for.

Environment: ``SPLITRUN_CPU_PROMPTS`` is ``bf16`` (the default: bf16 or int16), ``int8``, ``torch`` (none of them), or
the name of a kernel; ``SPLITRUN_CPU_KERNELS`` holds here too. Knows pointers and sizes, no models.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache

import torch
from torch import Tensor

from splitrun.kernels.cpu.library import DTYPES, Matrix, kernel, native, scratch_address
from splitrun.kernels.cpu.settings import (
    KINDS,
    LEVEL_VARIABLE,
    LEVELS,
    PROMPT_KERNELS,
    PROMPT_VARIABLE,
    TORCH,
    check_settings,
)

ARITHMETICS = ("bf16", "int8", "int16", "fp32")
"""Kinds in the library's own order."""
MEANT = {"bf16": ("bf16", "int16"), "int8": ("int8",)}
"""A kind that one may ask for -> the kinds of kernels that serve it."""
ATTENTION = ("bf16", "fp32")
"""Kinds that multiply with keys and values."""


class ManyRows:
    """One kernel. Tensors are on the CPU and contiguous; nothing is checked in C.

    ``kind`` is one of ARITHMETICS; ``span`` the groups of 64 columns that share a scale in integers.
    """

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self.name: str = library.splitrun_many_name(address).decode()
        self.kind = ARITHMETICS[library.splitrun_many_kind(address)]
        self.span: int = library.splitrun_many_span(address)
        self.address = address
        self._library = library
        self._product = library.splitrun_many_product
        self._spin = library.splitrun_many_spin
        self._scratch_bytes = cache(library.splitrun_many_scratch_bytes)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether activations of this type lose nothing on the way in that the kind does not say."""
        return dtype == torch.bfloat16 or (self.kind != "bf16" and dtype == torch.float16)

    def product(self, weight: Matrix, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """Write ``x @ weight.T + bias`` to out. Shape: (rows, columns) -> (rows, weight rows), one dtype."""
        rows, threads = x.shape[0], torch.get_num_threads()
        self._product(
            self.address,
            ctypes.addressof(weight),
            x.data_ptr(),
            DTYPES[x.dtype],
            rows,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            scratch_address(self._scratch_bytes(self.address, rows, weight.columns, threads)),
            threads,
        )

    def chunk(
        self, attention: ManyRows, block: int, rows: int, hidden: Tensor, cosines: Tensor, sines: Tensor, out: Tensor
    ) -> None:
        """Run a decoder layer whose structures lie at these addresses, for any number of tokens, all in bf16.

        ``attention`` is a kernel of a kind in ATTENTION. Shape: (tokens, hidden) -> same.
        """
        threads, library = torch.get_num_threads(), self._library
        nbytes = library.splitrun_chunk_scratch_bytes(self.address, block, hidden.shape[0], threads)
        library.splitrun_chunk(
            self.address,
            attention.address,
            block,
            rows,
            hidden.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            out.data_ptr(),
            scratch_address(nbytes),
            threads,
        )

    def spin(self, rounds: int) -> int:
        """Multiply and add registers on all threads, nothing else; returns the operations (for benchmarks)."""
        return int(self._spin(self.address, rounds, torch.get_num_threads()))


def every() -> dict[str, ManyRows]:
    """Every kernel that this build has and this processor runs, untested, best first."""
    library, found = native(), dict[str, ManyRows]()
    while library is not None and (address := library.splitrun_many(len(found))):
        candidate = ManyRows(library, address)
        found[candidate.name] = candidate
    return found


def many_rows() -> ManyRows | None:
    """The kernel for prompts in this process; None: torch multiplies the values. Follows ``SPLITRUN_CPU_PROMPTS``.

    Raises InvalidRequest where that names nothing.
    """
    return _chosen(os.environ.get(PROMPT_VARIABLE) or KINDS[0])


def attention_rows() -> ManyRows | None:
    """The kernel that multiplies for attention inside a chunk; None: chunks go another way."""
    chosen = many_rows()
    return chosen if chosen is None or chosen.kind in ATTENTION else _first_right(ATTENTION)


def of_level(level: str) -> dict[str, ManyRows]:
    """Those of `every` that a level has: its own, and those of the levels below."""
    best = LEVELS.index(level)
    return {name: one for name, one in every().items() if LEVELS.index(PROMPT_KERNELS[name]) >= best}


def available() -> dict[str, ManyRows]:
    """Those of the level that this process multiplies few rows with; none without one."""
    few = kernel()
    return {} if few is None else of_level(few.name)


@cache
def _chosen(wanted: str) -> ManyRows | None:
    """The best kernel that serves a kind one may ask for, or one by name; the default one where there is none."""
    check_settings()
    if wanted == TORCH:
        return None
    if wanted in PROMPT_KERNELS:
        return _right(available()[wanted]) if wanted in available() else _chosen(KINDS[0])
    found = _first_right(MEANT[wanted])
    return found or (_chosen(KINDS[0]) if wanted != KINDS[0] else None)


@cache
def _first_right(kinds: tuple[str, ...]) -> ManyRows | None:
    """The best kernel of these kinds. The first that fails its test ends the search."""
    candidate = next((one for one in available().values() if one.kind in kinds), None)
    return None if candidate is None or _torch_is_faster(candidate) else _right(candidate)


def _torch_is_faster(candidate: ManyRows) -> bool:
    """Whether torch multiplies bf16 with tile instructions, where our own kernel for those is missing."""
    library = native()
    held = bool(os.environ.get(LEVEL_VARIABLE))
    tiles = library is not None and bool(library.splitrun_has_tiles()) and not held
    return tiles and candidate.kind != "int8" and PROMPT_KERNELS[candidate.name] != LEVELS[0]


def _right(candidate: ManyRows) -> ManyRows | None:
    """The kernel, unless it fails its test: then None, with one warning."""
    from splitrun.kernels.cpu.selftest import first_fault_of_many

    fault = first_fault_of_many(candidate)
    if fault is None:
        return candidate
    warnings.warn(
        f"the {candidate.name} kernel for prompts is switched off: {fault}. splitrun goes on with torch's product; "
        "please report this processor's name",
        RuntimeWarning,
        stacklevel=4,
    )
    return None
