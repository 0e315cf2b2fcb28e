"""Products of many activation rows (prompts) with nf4 and int8 weights: which kernel runs here, and its call.

Two kinds of arithmetic, for more than 16 rows: ``bf16`` multiplies the format's values rounded to bf16 with bf16
activations; ``int8`` rounds activations to int8 like the products of few rows, about twice as fast, and is used only
where asked for. Environment: ``SPLITRUN_CPU_PROMPTS`` is ``bf16`` (the default), ``int8``, ``torch`` (none of them),
or the name of a kernel. Knows pointers and sizes, no models.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache

import torch
from torch import Tensor

from splitrun.kernels.cpu.library import DTYPES, Matrix, kernel, native, scratch_address
from splitrun.kernels.cpu.settings import KINDS, PROMPT_VARIABLE, TORCH, check_settings

WORSE_THAN_TORCH = ("avx512bf16",)
"""Kernels that torch beats where the processor has tile instructions."""


class ManyRows:
    """One kernel. Tensors are on the CPU and contiguous; nothing is checked in C.

    ``kind`` is one of KINDS; ``span`` the groups of 64 columns that share a scale in int8.
    """

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self.name: str = library.splitrun_many_name(address).decode()
        self.kind = KINDS[library.splitrun_many_kind(address)]
        self.span: int = library.splitrun_many_span(address)
        self.address = address
        self._library = library
        self._product = library.splitrun_many_product
        self._spin = library.splitrun_many_spin
        self._scratch_bytes = cache(library.splitrun_many_scratch_bytes)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether activations of this type lose nothing on the way in that the kind does not say."""
        return dtype == torch.bfloat16 or (self.kind == "int8" and dtype == torch.float16)

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

        ``attention`` is a kernel of kind bf16. Shape: (tokens, hidden) -> same.
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
    """The kernel that multiplies for attention inside a chunk: always bf16; None: chunks go another way."""
    chosen = many_rows()
    return chosen if chosen is None or chosen.kind == KINDS[0] else _chosen(KINDS[0])


@cache
def _chosen(wanted: str) -> ManyRows | None:
    """The best kernel of a kind, or one by name. The first that fails its test ends the search, with one warning."""
    from splitrun.kernels.cpu.selftest import first_fault_of_many

    check_settings()
    library = native()
    if library is None or wanted == TORCH or kernel() is None:
        return None
    found = every()
    candidate = found.get(wanted) or next((one for one in found.values() if one.kind == wanted), None)
    if candidate is None or (candidate.name in WORSE_THAN_TORCH and library.splitrun_has_tiles() and wanted in KINDS):
        return None
    fault = first_fault_of_many(candidate)
    if fault is None:
        return candidate
    warnings.warn(
        f"the {candidate.name} kernel for prompts is switched off: {fault}. splitrun goes on with torch's product; "
        "please report this processor's name",
        RuntimeWarning,
        stacklevel=3,
    )
    return None
