"""What `doctor` finds: each finding from facts that bring it about, and none where all is well."""

from typing import Any

import pytest

from splitrun.measure.accelerators import Accelerator
from splitrun.measure.health import Package, find_compiler, findings, installed_version, required_packages
from splitrun.measure.host import HostMemory, Processor

GIB = 1 << 30
WELL: dict[str, Any] = {
    "packages": [Package("torch", "2.13.0+cpu", ">=2.11,<2.14")],
    "processor": Processor("Test CPU", 4, ("avx2",)),
    "memory": HostMemory(16 * GIB, 8 * GIB),
    "accelerators": [],
    "driver_cards": [],
    "torch_version": "2.13.0",
    "compiler": "/usr/bin/cc",
    "kernels": "avx2",
}


def cuda(**changes: Any) -> Accelerator:
    fields: dict[str, Any] = {"name": "cuda:0", "kind": "cuda", "description": "Card", "total_bytes": GIB}
    return Accelerator(**(fields | {"free_bytes": GIB, "compute_capability": (8, 6)} | changes))


def test_nothing_to_say_where_all_is_well() -> None:
    assert findings(**WELL) == []
    assert findings(**(WELL | {"accelerators": [cuda()], "driver_cards": [("Card", GIB)]})) == []


@pytest.mark.parametrize(
    ("change", "text", "needed"),
    [
        ({"packages": [Package("ray", None, ">=2.60")]}, "ray is not installed: pip install 'ray>=2.60'", True),
        ({"packages": [Package("ray", None)]}, "ray is not installed: pip install ray", True),
        ({"packages": [Package("torch", "2.15.0", ">=2.11,<2.14")]}, "torch 2.15.0 is outside >=2.11,<2.14", True),
        ({"accelerators": [cuda(fault="cuda:0 is broken")]}, "cuda:0 is broken", False),
        ({"driver_cards": [("GTX 1060", 3 * GIB)]}, "the driver sees GTX 1060, but torch 2.13.0 does not", False),
        ({"accelerators": [cuda(compute_capability=(6, 1))]}, "keep a cu126 build of torch, 2.14 at most", False),
        ({"processor": Processor("Old CPU", 2, ("avx",))}, "Old CPU has no AVX2", False),
        ({"memory": HostMemory(4 * GIB, GIB)}, "only 1.00 GiB of main memory is free", False),
        ({"compiler": None}, "there is no C compiler", False),
        ({"kernels": None}, "the compiled CPU kernels are absent", False),
    ],
)
def test_findings(change: dict[str, Any], text: str, needed: bool) -> None:
    (finding,) = findings(**(WELL | change))
    assert text in finding.text
    assert finding.needed == needed


def test_compilers_are_tried_in_order() -> None:
    assert find_compiler({"gcc": "/usr/bin/gcc", "clang": "/usr/bin/clang"}.get) == "/usr/bin/gcc"
    assert find_compiler(lambda name: None) is None


def test_required_packages_name_torch_and_no_extras() -> None:
    packages = {package.name: package for package in required_packages(lambda name: "1.0")}
    assert packages["torch"].version == "1.0"
    assert "pytest" not in packages
    assert installed_version("no-such-distribution-here") is None
