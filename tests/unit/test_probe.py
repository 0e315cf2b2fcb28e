"""Probing machines that the tests do not run on: a described /proc, a stand-in for torch, and canned stop-watches."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitrun.errors import InvalidPlacement
from splitrun.measure.accelerators import build_fault, list_accelerators
from splitrun.measure.cache import Cache, cache_folder
from splitrun.measure.context import DEFAULT_CONTEXT_BYTES, card_memory
from splitrun.measure.probe import UNMEASURED_LINK, UNMEASURED_SPEED, Machine, probe, survey
from splitrun.measure.speed import Speed, best_seconds, device_speed, host_link, host_speed
from splitrun.planner.facts import Link

GIB, MIB = 1 << 30, 1 << 20
FILES = {
    "/proc/cpuinfo": "processor : 0\nmodel name : Test CPU\ncore id : 0\nflags : avx2\n",
    "/proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {10 << 20} kB\n",
}


class FakeTensor:
    def __matmul__(self, other: Any) -> Any:
        return self


class FakeCuda:
    """Cards with a driver's free memory: a first tensor takes the context, as on a real one."""

    def __init__(self, cards: list[dict[str, Any]], architectures: list[str], initialized: bool = False) -> None:
        self.cards, self.architectures, self.initialized = cards, architectures, initialized

    def is_available(self) -> bool:
        return bool(self.cards)

    def is_initialized(self) -> bool:
        return self.initialized

    def device_count(self) -> int:
        return len(self.cards)

    def get_arch_list(self) -> list[str]:
        return self.architectures

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(**self.cards[index]["properties"])

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.touch(index)
        return self.cards[index]["free"], self.cards[index]["properties"]["total_memory"]

    def memory_reserved(self, index: int) -> int:
        return 0

    def synchronize(self, index: int) -> None:
        if self.cards[index].get("broken"):
            raise RuntimeError("CUDA error: no kernel image is available\nmore")

    def empty_cache(self) -> None:
        pass

    def touch(self, index: int) -> None:
        card = self.cards[index]
        if not card.get("touched"):
            card["free"] -= card["context"]
            card["touched"] = self.initialized = True


def card(total: int = 8 * GIB, context: int = 300 * MIB, major: int = 8, minor: int = 6, **rest: Any) -> dict[str, Any]:
    properties = {"name": "Test Card", "total_memory": total, "major": major, "minor": minor, "uuid": "u"}
    properties |= {"is_integrated": rest.pop("integrated", 0)}
    return {"properties": properties, "free": total - GIB, "context": context} | rest


def fake_torch(
    cards: list[dict[str, Any]] | None = None, architectures: tuple[str, ...] = ("sm_86",), **rest: Any
) -> Any:
    cuda = FakeCuda(cards or [], list(architectures))

    def ones(shape: Any, device: str, dtype: Any) -> FakeTensor:
        cuda.touch(int(device.partition(":")[2]))
        return FakeTensor()

    private = SimpleNamespace(_cuda_hasPrimaryContext=lambda index: bool(cuda.cards[index].get("touched")))
    parts = {
        "cuda": cuda,
        "xpu": SimpleNamespace(is_available=lambda: False),
        "backends": SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
        "version": SimpleNamespace(cuda="12.6", hip=None, xpu=None),
        "__version__": "2.13.0",
        "float16": "fp16",
        "ones": ones,
        "_C": private,
    }
    return SimpleNamespace(**(parts | rest))


def machine(torch: Any, tmp_path: Path, refresh: bool = False, answers: bool = True) -> Machine:
    def driver_free(uuid: str) -> int | None:
        return torch.cuda.cards[0]["free"] if answers else None

    return Machine(
        torch=torch,
        cache=Cache(tmp_path, refresh),
        read=FILES.get,
        allowed=lambda: frozenset({0}),
        driver_free=driver_free,
        host_speed=lambda *arguments: Speed(30e9, 1e12),
        device_speed=lambda *arguments: Speed(300e9, 20e12),
        host_link=lambda torch, kind, name, to_device: Link(10e-6, 25e9 if to_device else 20e9),
    )


def test_a_card_and_the_processor(tmp_path: Path) -> None:
    cluster = probe(machine=machine(fake_torch([card()]), tmp_path))
    cpu, cuda = cluster.devices
    assert (cpu.name, cpu.kind, cpu.memory_pool, cpu.context_bytes) == ("cpu", "cpu", "host", 0)
    assert (cpu.budget_bytes, cpu.description) == (9 * GIB, "Test CPU, 1 core")
    assert (cuda.name, cuda.kind, cuda.memory_pool, cuda.compute_dtype) == ("cuda:0", "cuda", "cuda:0", "bf16")
    assert (cuda.context_bytes, cuda.free_bytes) == (300 * MIB, 7 * GIB)  # free counts the context that is now taken
    assert cuda.budget_bytes == 7 * GIB - 7 * GIB // 20
    assert cluster.link("cpu", "cuda:0") == Link(10e-6, 25e9)
    assert cluster.link("cuda:0", "cpu") == Link(10e-6, 20e9)


def test_named_devices_only_and_virtual_processors(tmp_path: Path) -> None:
    cluster = probe({"cpu": "2GiB", "cpu:1": "1GiB"}, machine(fake_torch([card()]), tmp_path))
    assert [(device.name, device.memory_pool, device.budget_bytes) for device in cluster.devices] == [
        ("cpu", "host", 2 * GIB),
        ("cpu:1", "cpu:1", GIB),
    ]
    with pytest.raises(InvalidPlacement, match="there is no device 'xpu:0' here; there is cpu, cuda:0"):
        probe({"xpu:0": "1GiB"}, machine(fake_torch([card()]), tmp_path))


def test_an_integrated_card_shares_the_host_memory(tmp_path: Path) -> None:
    torch = fake_torch([card(total=14 * GIB, integrated=1)])
    cluster = probe(machine=machine(torch, tmp_path))
    cuda = cluster.device("cuda:0")
    assert cuda.memory_pool == "host"
    assert cuda.free_bytes == 10 * GIB  # the smaller of the card's 13 and the host's 10, never the sum
    assert cuda.budget_bytes == cluster.device("cpu").budget_bytes


@pytest.mark.parametrize(
    ("capability", "architectures", "works"),
    [
        ((8, 6), ["sm_80"], True),  # code for 8.0 runs on later 8.x
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # the driver translates it
        ((6, 1), ["sm_75", "sm_80", "compute_90"], False),
        ((6, 1), ["sm_50", "sm_60", "sm_70"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),
        ((10, 3), ["compute_100a"], False),
        ((8, 6), [], True),  # a build that does not say is tried
    ],
)
def test_whether_the_build_has_code_for_the_card(
    capability: tuple[int, int], architectures: list[str], works: bool
) -> None:
    fault = build_fault("cuda:0", capability, architectures)
    assert (fault is None) == works
    if capability == (6, 1) and not works:
        assert "cu126" in str(fault)


def test_a_card_that_cannot_compute_is_kept_out_with_the_reason(tmp_path: Path) -> None:
    old = survey(machine(fake_torch([card(major=6, minor=1)], ("sm_75",)), tmp_path))
    assert "compute capability 6.1" in str(old.accelerators[0].fault)
    broken = machine(fake_torch([card(broken=True)]), tmp_path)
    assert "cuda:0 failed its first computation: CUDA error: no kernel image" in str(
        survey(broken).accelerators[0].fault
    )
    assert [device.name for device in probe(machine=broken).devices] == ["cpu"]


def test_below_capability_8_the_half_type_is_fp16(tmp_path: Path) -> None:
    cluster = probe(machine=machine(fake_torch([card(major=7, minor=5)], ("sm_75",)), tmp_path))
    assert cluster.device("cuda:0").compute_dtype == "fp16"
    assert cluster.device("cuda:0").compute_capability == (7, 5)


def test_amd_cards_have_no_compute_capability(tmp_path: Path) -> None:
    torch = fake_torch([card(major=11, minor=0)], ("gfx1100",), version=SimpleNamespace(hip="6.4", cuda=None))
    cluster = probe(machine=machine(torch, tmp_path))
    assert cluster.device("cuda:0").compute_capability is None


def test_context_is_remembered_when_it_cannot_be_measured(tmp_path: Path) -> None:
    blind = machine(fake_torch([card()]), tmp_path, answers=False)
    assert probe(machine=blind).device("cuda:0").context_bytes == DEFAULT_CONTEXT_BYTES
    probe(machine=machine(fake_torch([card()]), tmp_path))
    blind = machine(fake_torch([card()]), tmp_path, answers=False)
    assert probe(machine=blind).device("cuda:0").context_bytes == 300 * MIB


def test_a_card_whose_context_is_known_computes_nothing(tmp_path: Path) -> None:
    probe(machine=machine(fake_torch([card()]), tmp_path))
    torch = fake_torch([card(broken=True)])  # its first product would fail
    found = probe(machine=machine(torch, tmp_path), compute=False).device("cuda:0")
    assert (found.context_bytes, found.free_bytes) == (300 * MIB, 7 * GIB)
    torch.cuda.touch(0)  # there already: what it took counts as free for this process
    torch._C = SimpleNamespace(_cuda_hasPrimaryContext=lambda index: True)
    found = probe(machine=machine(torch, tmp_path), compute=False).device("cuda:0")
    assert (found.context_bytes, found.free_bytes) == (300 * MIB, 7 * GIB)
    unknown = machine(fake_torch([card(broken=True)]), tmp_path / "other")
    assert "cuda:0" not in {device.name for device in probe(machine=unknown, compute=False).devices}


def test_an_implausible_context_is_another_process() -> None:
    torch = fake_torch([card(context=5 * GIB)])
    found = card_memory(torch, 0, lambda uuid: torch.cuda.cards[0]["free"])
    assert (found.measured, found.context_bytes) == (False, DEFAULT_CONTEXT_BYTES)


def test_intel_and_apple(tmp_path: Path) -> None:
    names = ["Intel(R) Arc(TM) A770 Graphics", "Intel(R) Arc(TM) Graphics", "Intel(R) Data Center GPU Max 1550"]
    xpu = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(names),
        get_device_properties=lambda index: SimpleNamespace(name=names[index], total_memory=12 * GIB),
        mem_get_info=lambda index: (11 * GIB, 12 * GIB),
    )
    found = list_accelerators(fake_torch(xpu=xpu))
    assert [item.integrated for item in found] == [False, True, False]
    mps = SimpleNamespace(recommended_max_memory=lambda: 8 * GIB, driver_allocated_memory=lambda: GIB)
    available = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True))
    (apple,) = list_accelerators(fake_torch(mps=mps, backends=available))
    assert (apple.name, apple.free_bytes, apple.integrated) == ("mps", 7 * GIB, True)


def test_measurements_are_kept_and_refreshed(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"a": float(len(calls))}

    assert Cache(tmp_path).get_or_measure("key", ("a",), measure) == {"a": 1.0}
    assert Cache(tmp_path).get_or_measure("key", ("a",), measure) == {"a": 1.0}
    assert Cache(tmp_path, refresh=True).get_or_measure("key", ("a",), measure) == {"a": 2.0}
    assert Cache(tmp_path).get_or_measure("key", ("a", "b"), measure) == {"a": 3.0}  # an entry of another shape


@pytest.mark.parametrize("content", ["", "not json", "[1]", '{"key": {"a": "x"}}', '{"key": {"a": -1}}', '{"key": 3}'])
def test_a_damaged_cache_is_an_empty_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "measurements.json").write_text(content)
    cache = Cache(tmp_path)
    assert cache.get("key") is None
    cache.put("key", {"a": 1.0})
    assert json.loads((tmp_path / "measurements.json").read_text()) == {"key": {"a": 1.0}}


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "below")
    cache.put("key", {"a": 1.0})
    assert cache.get("key") == {"a": 1.0}


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"SPLITRUN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/splitrun")),
        ({}, Path.home() / ".cache" / "splitrun"),
    ],
)
def test_cache_folder(environment: dict[str, str], folder: Path) -> None:
    assert cache_folder(environment) == folder


def test_the_best_of_at_least_three_runs_after_one_to_warm_up() -> None:
    runs: list[int] = []
    assert best_seconds(lambda: runs.append(1), 0.0) > 0
    assert len(runs) == 4


def test_speeds_of_this_machine_are_positive_and_threads_are_put_back() -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    found = host_speed(torch, 1, GIB)
    assert found.bandwidth_bytes_per_s > 0
    assert found.flops_per_s > 0
    assert torch.get_num_threads() == threads


@pytest.mark.gpu
def test_speeds_of_a_card() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = device_speed(torch, "cuda", "cuda:0", "bf16", 2 * GIB)
    assert found.bandwidth_bytes_per_s > host_link(torch, "cuda", "cuda:0", True).bandwidth_bytes_per_s > 0


def test_a_card_that_others_fill_gets_modest_figures(tmp_path: Path) -> None:
    def no_memory(*arguments: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    full = replace(machine(fake_torch([card()]), tmp_path), device_speed=no_memory, host_link=no_memory)
    cluster = probe(machine=full)
    assert cluster.device("cuda:0").bandwidth_bytes_per_s == UNMEASURED_SPEED.bandwidth_bytes_per_s
    assert cluster.link("cpu", "cuda:0") == UNMEASURED_LINK
    again = probe(machine=machine(fake_torch([card()]), tmp_path))  # what was not measured was not kept
    assert again.device("cuda:0").bandwidth_bytes_per_s == 300e9
