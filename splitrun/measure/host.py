"""What this machine's processors and memory offer to this process: affinity and control groups are limits too.

Reads /proc and /sys/fs/cgroup through an injected reader, so that every machine can be described in a test. Where there
is no /proc (macOS, Windows) psutil answers. Knows nothing of torch, budgets or speeds.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from splitrun.kernels.cpu.regions import filled_bytes

ReadFile = Callable[[str], str | None]
"""Path -> content, None when there is no such file or it may not be read."""

INSTRUCTION_SETS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Those that a kernel here or in torch chooses by, as the kernel of the operating system spells them."""

_UNLIMITED = 1 << 60
"""Version 1 control groups write "no limit" as a number just below 2^63."""


@dataclass(frozen=True)
class Processor:
    """``cores`` is how many threads compute at full speed: physical cores, of those allowed, within the quota."""

    name: str
    cores: int
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True)
class HostMemory:
    """Bytes of main memory: what this process could ever have, and what it could take now without swapping."""

    total_bytes: int
    free_bytes: int


def read_file(path: str) -> str | None:
    """The file's text, or None when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def allowed_processors() -> frozenset[int]:
    """Numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_processor(read: ReadFile = read_file, allowed: frozenset[int] | None = None) -> Processor:
    """Describe the processor; ``allowed`` are the logical processors that may be used (default: asked)."""
    allowed = allowed_processors() if allowed is None else allowed
    blocks = [_fields(block) for block in (read("/proc/cpuinfo") or "").split("\n\n") if block.strip()]
    present = [block for block in blocks if block.get("processor", "").isdigit()]
    mine = [block for block in present if int(block["processor"]) in allowed]
    if mine and all("core id" in block for block in mine):
        physical = len({(block.get("physical id", "0"), block["core id"]) for block in mine})
    else:
        physical = min(len(allowed), _psutil_cores() if not present else len(allowed))
    quota = cpu_quota(read)
    cores = physical if quota is None else min(physical, max(1, int(quota)))
    flags = next((block[key] for block in mine for key in ("flags", "Features") if key in block), "").split()
    name = next((block[key] for block in mine for key in ("model name", "Model", "Hardware") if key in block), "")
    sets = tuple(name for name in INSTRUCTION_SETS if name in flags)
    return Processor(name.strip() or platform.processor() or platform.machine(), max(1, cores), sets)


def logical_processors(read: ReadFile = read_file, allowed: frozenset[int] | None = None) -> int:
    """Threads that can run at once: the logical processors that may be used, within the quota."""
    count, quota = len(allowed_processors() if allowed is None else allowed), cpu_quota(read)
    return count if quota is None else min(count, max(1, int(quota)))


def read_host_memory(read: ReadFile = read_file) -> HostMemory:
    """Main memory: the machine's, or less where a control group limits this process."""
    fields = _fields(read("/proc/meminfo") or "")
    if "MemTotal" in fields:
        total = _kibibytes(fields["MemTotal"])
        free = _kibibytes(fields.get("MemAvailable", fields.get("MemFree", "0")))
    else:
        import psutil

        memory = psutil.virtual_memory()
        total, free = int(memory.total), int(memory.available)
    for limit, used in memory_limits(read):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return HostMemory(total, min(total, free + filled_bytes()))


def memory_limits(read: ReadFile = read_file) -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of every control group that this process is in, from its own up to the root.

    Use leaves out inactive file pages: the kernel drops them before it refuses memory.
    """
    for folder, version in _control_groups(read, "memory"):
        names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
        limit, used = (_number(read(f"{folder}/{name}")) for name in names)
        if limit is None or limit >= _UNLIMITED:
            continue
        statistics = dict(line.split(None, 1) for line in (read(f"{folder}/memory.stat") or "").splitlines() if line)
        droppable = _number(statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))) or 0
        yield limit, max(0, (used or 0) - droppable)


def cpu_quota(read: ReadFile = read_file) -> float | None:
    """Processors' worth of time that control groups allow, None without a limit."""
    quotas = []
    for folder, version in _control_groups(read, "cpu"):
        if version == 2:
            words = (read(f"{folder}/cpu.max") or "max").split()
            amount, period = _number(words[0]), _number(words[1]) if len(words) > 1 else 100_000
        else:
            amount, period = (_number(read(f"{folder}/cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if amount is not None and amount > 0 and period:
            quotas.append(amount / period)
    return min(quotas, default=None)


def _control_groups(read: ReadFile, controller: str) -> Iterator[tuple[str, int]]:
    """(folder, version) of the groups of this process, leaf first.

    In a container the path that the kernel reports may not exist below the mount; its parents are then tried, of which
    the mount itself always exists.
    """
    for line in (read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        mounts = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified") if version == 2 else (f"/sys/fs/cgroup/{controller}",)
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for mount in mounts:
            for length in range(len(parts), -1, -1):
                yield "/".join([mount, *parts[:length]]), version


def _fields(text: str) -> dict[str, str]:
    """ "name : value" lines as a mapping; a repeated name keeps its first value."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _kibibytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def _number(text: str | None) -> int | None:
    """The whole number that a file or field holds; None for "max", garbage and nothing."""
    try:
        return None if text is None else int(text.strip())
    except ValueError:
        return None


def _psutil_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def worker_threads(workers: int, environment: Mapping[str, str] = os.environ) -> int:
    """Threads of each of so many workers on this processor: OMP_NUM_THREADS or the cores, shared among them."""
    cores, asked = read_processor().cores, environment.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        cores = min(cores, int(asked))
    return max(1, cores // workers)
