"""Processors and memory of described machines: affinity, physical cores, both versions of control groups."""

import pytest

from splitrun.measure.host import (
    ReadFile,
    cpu_quota,
    logical_processors,
    memory_limits,
    read_host_memory,
    read_processor,
)

GIB = 1 << 30


def processor(number: int, package: int, core: int) -> str:
    return (
        f"processor\t: {number}\nmodel name\t: Some CPU @ 2.00GHz\nphysical id\t: {package}\ncore id\t\t: {core}\n"
        "flags\t\t: fpu avx avx2 fma avx512f avx512_vnni\n"
    )


# Two packages of two cores with two threads each.
CPUINFO = "\n".join(processor(n, (n // 2) % 2, n % 2) for n in range(8))
ARM = "\n".join(f"processor\t: {n}\nBogoMIPS\t: 50.0\nFeatures\t: fp asimd asimddp i8mm\n" for n in range(4))
MEMINFO = f"MemTotal: {16 << 20} kB\nMemFree: {2 << 20} kB\nMemAvailable: {10 << 20} kB\n"


def reader(files: dict[str, str]) -> ReadFile:
    return files.get


@pytest.mark.parametrize(
    ("allowed", "quota", "cores"),
    [
        (range(8), "max 100000", 4),  # threads of one core count once
        ([0, 4], "max 100000", 1),  # both threads of core 0
        ([0, 1], "max 100000", 2),
        (range(8), "200000 100000", 2),
        (range(8), "250000 100000", 2),  # a third thread would run half the time and hold up the others
        (range(8), "50000 100000", 1),
        (range(8), "garbage", 4),
    ],
)
def test_cores_are_physical_allowed_and_within_the_quota(allowed: list[int], quota: str, cores: int) -> None:
    files = {"/proc/cpuinfo": CPUINFO, "/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": quota}
    found = read_processor(reader(files), frozenset(allowed))
    assert found.cores == cores
    assert cores <= logical_processors(reader(files), frozenset(allowed)) <= len(allowed)
    assert found.name == "Some CPU @ 2.00GHz"
    assert found.instruction_sets == ("avx", "avx2", "fma", "avx512f", "avx512_vnni")


def test_threads_that_run_at_once_are_allowed_and_within_the_quota() -> None:
    files = {"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": "350000 100000"}
    assert logical_processors(reader(files), frozenset(range(8))) == 3
    assert logical_processors(reader({}), frozenset(range(8))) == 8


def test_arm_has_no_core_ids_so_every_allowed_processor_is_a_core() -> None:
    found = read_processor(reader({"/proc/cpuinfo": ARM}), frozenset({0, 1, 2}))
    assert found.cores == 3
    assert found.instruction_sets == ("asimd", "asimddp", "i8mm")


def test_without_proc_there_is_still_a_core() -> None:
    assert read_processor(reader({}), frozenset({0})).cores == 1


VERSION_1 = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n"
V1_MEMORY, V1_CPU = "/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        pytest.param({}, 16, 10, id="no groups"),
        pytest.param(
            {"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n"}, 16, 10, id="v2 unlimited"
        ),
        pytest.param(
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max": "max\n",
                "/sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
                "/sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
                "/sys/fs/cgroup/a/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
            },
            4,
            3,
            id="v2 parent limits, droppable pages are not use",
        ),
        pytest.param(
            {
                "/proc/self/cgroup": VERSION_1,
                f"{V1_MEMORY}/docker/abc/memory.limit_in_bytes": f"{8 * GIB}",
                f"{V1_MEMORY}/docker/abc/memory.usage_in_bytes": f"{7 * GIB}",
                f"{V1_MEMORY}/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
            },
            8,
            2,
            id="v1",
        ),
        pytest.param(
            {
                "/proc/self/cgroup": VERSION_1,
                f"{V1_MEMORY}/memory.limit_in_bytes": f"{2 * GIB}",
                f"{V1_MEMORY}/memory.usage_in_bytes": f"{3 * GIB}",
            },
            2,
            0,
            id="v1 seen from inside the container, over its limit",
        ),
        pytest.param(
            {"/proc/self/cgroup": VERSION_1, f"{V1_MEMORY}/memory.limit_in_bytes": "9223372036854771712"},
            16,
            10,
            id="v1 unlimited",
        ),
    ],
)
def test_memory_is_the_least_of_machine_and_groups(files: dict[str, str], total: int, free: int) -> None:
    found = read_host_memory(reader({"/proc/meminfo": MEMINFO} | files))
    assert (found.total_bytes, found.free_bytes) == (total * GIB, free * GIB)


def test_old_kernels_without_memavailable() -> None:
    found = read_host_memory(reader({"/proc/meminfo": "MemTotal: 2048 kB\nMemFree: 1024 kB\n"}))
    assert found.free_bytes == 1 << 20


def test_without_proc_the_system_is_asked() -> None:
    found = read_host_memory(reader({}))
    assert 0 < found.free_bytes <= found.total_bytes


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({f"{V1_CPU}/docker/abc/cpu.cfs_quota_us": "-1", f"{V1_CPU}/docker/abc/cpu.cfs_period_us": "100000"}, None),
        ({f"{V1_CPU}/docker/abc/cpu.cfs_quota_us": "150000", f"{V1_CPU}/docker/abc/cpu.cfs_period_us": "100000"}, 1.5),
        ({f"{V1_CPU}/cpu.cfs_quota_us": "300000", f"{V1_CPU}/cpu.cfs_period_us": "0"}, None),
    ],
)
def test_version_1_quota(files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(reader({"/proc/self/cgroup": VERSION_1} | files)) == quota


def test_garbage_limits_are_no_limits() -> None:
    files = {"/proc/self/cgroup": "0::/../x\nnonsense\n", "/sys/fs/cgroup/x/memory.max": "lots"}
    assert list(memory_limits(reader(files))) == []
