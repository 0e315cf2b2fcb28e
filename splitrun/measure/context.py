"""What CUDA itself takes of a card before the first tensor: the context with its loaded kernels.

It is the difference in what the driver reports free, before and after this process computes its first product there.
The driver's own view is read through NVML, which needs no context. Where the process already has a context, the figure
is remembered from an earlier run or a documented default. Knows nothing of budgets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CUBLAS_WORKSPACE = ":4096:2:16:8"
"""8 MiB for each thread that multiplies, as on every card before Hopper; there cuBLAS would take 32."""
DEFAULT_CONTEXT_BYTES = 512 << 20
"""Where it cannot be measured: between the 200 MiB of a small old card and the 600 MiB of a data-centre one."""
LEAST_CONTEXT_BYTES, MOST_CONTEXT_BYTES = 16 << 20, 2 << 30
"""A difference outside is another process's doing."""

DriverFree = Callable[[str], int | None]
"""A card's UUID -> bytes that the driver reports free; None when it does not answer."""


@dataclass(frozen=True)
class CardMemory:
    """``free_bytes`` is what this process could have, its context included. ``measured``: the context was, here."""

    free_bytes: int
    context_bytes: int
    measured: bool


def card_memory(
    torch: Any, index: int, driver_free: DriverFree, known_context_bytes: int | None = None, compute: bool = True
) -> CardMemory:
    """Create the context of card ``index`` where there is none yet, and say what it took.

    Without ``compute``, a card whose context is known computes nothing: the library that would multiply takes a hundred
    MiB of main memory for the life of the process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    cuda = torch.cuda
    fresh = not _has_context(torch, index)
    before = driver_free(str(getattr(cuda.get_device_properties(index), "uuid", ""))) if fresh else None
    if not compute and known_context_bytes is not None:
        free = before if fresh else int(cuda.mem_get_info(index)[0]) + int(cuda.memory_reserved(index))
        if free is not None:
            return CardMemory(free + (0 if fresh else known_context_bytes), known_context_bytes, measured=False)
    product = torch.ones((64, 64), device=f"cuda:{index}", dtype=torch.float16)
    product = product @ product
    cuda.synchronize(index)
    del product
    if fresh:  # later, captured graphs may have the workspaces
        _free_cublas_workspaces(torch)
    cuda.empty_cache()
    now = int(cuda.mem_get_info(index)[0]) + int(cuda.memory_reserved(index))
    if before is not None and _plausible(before - now):
        return CardMemory(before, before - now, measured=True)
    context = DEFAULT_CONTEXT_BYTES if known_context_bytes is None else known_context_bytes
    return CardMemory(now + context, context, measured=False)


def _plausible(context_bytes: int) -> bool:
    return LEAST_CONTEXT_BYTES <= context_bytes <= MOST_CONTEXT_BYTES


def card_uses(torch: Any, index: int, driver_free: DriverFree) -> Callable[[], int]:
    """Ask before the process has a context on card ``index``. What comes back says, later, how many bytes it holds
    there beside what torch's allocator does: the context with all kernels loaded until then; 0 where nobody tells."""
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    before = None if _has_context(torch, index) else driver_free(uuid)

    def beside_allocator() -> int:
        now = driver_free(uuid)
        if before is None or now is None:
            return 0
        found = before - now - int(torch.cuda.memory_reserved(index))
        return found if _plausible(found) else 0

    return beside_allocator


def _has_context(torch: Any, index: int) -> bool:
    if not torch.cuda.is_initialized():
        return False
    ask = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return True if ask is None else bool(ask(index))


def _free_cublas_workspaces(torch: Any) -> None:
    """Nobody multiplies on this thread's stream again, and its workspace would stay for the life of the process."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


def nvml_free(uuid: str) -> int | None:
    """What NVIDIA's management library reports free on the card; None without the library or the card."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        text = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(text)).free)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def driver_cards() -> list[tuple[str, int]]:
    """(name, total bytes) of every NVIDIA card that the driver knows, whatever torch can do with it."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [(str(pynvml.nvmlDeviceGetName(h)), int(pynvml.nvmlDeviceGetMemoryInfo(h).total)) for h in handles]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
