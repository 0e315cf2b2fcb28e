"""What libraries raise inside a stage, as one of our errors that names the stage."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from splitrun.engine.pipeline import translated
from splitrun.errors import DeviceOutOfMemory, SplitrunError, StageLost, StageTimeout

FULL = "stage head on cpu ran out of memory: plan again with --context 64 (now 128)"
TABLE: list[tuple[Exception, type[SplitrunError], str]] = [
    (MemoryError(), DeviceOutOfMemory, FULL),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DeviceOutOfMemory, FULL),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"), DeviceOutOfMemory, FULL),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), DeviceOutOfMemory, FULL),  # of a map of memory
    (RuntimeError("CUDA error: out of memory\nCompile with"), DeviceOutOfMemory, FULL),  # the driver's, of a graph
    (RuntimeError("Triton Error [CUDA]: out of memory"), DeviceOutOfMemory, FULL),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), DeviceOutOfMemory, FULL),
    (RuntimeError("one line\nand another"), StageLost, "stage head on cpu failed: RuntimeError: one line"),
    (StageTimeout("ours"), StageTimeout, "ours"),
]


@pytest.mark.parametrize(("error", "kind", "message"), TABLE, ids=lambda value: str(value)[:40])
def test_a_fault_names_its_stage(error: Exception, kind: type[SplitrunError], message: str) -> None:
    found = translated(error, "stage head on cpu", "--context 64 (now 128)")
    assert (type(found), str(found)) == (kind, message)
