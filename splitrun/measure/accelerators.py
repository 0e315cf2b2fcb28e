"""Which accelerators torch can compute on here, and what each says of itself. Measures no speed, decides no budget.

torch is passed in, so that a test can stand in for machines that it does not run on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

_DISCRETE_INTEL = re.compile(r"\b(?:[AB]\d{2,3}M?|Max|Flex|Data Center)\b")
"""Names of Intel's discrete cards; older torch builds do not say which devices are integrated."""


@dataclass(frozen=True)
class Accelerator:
    """One device as its driver describes it.

    ``free_bytes`` is what is free now (a CUDA card: at most, until the probe has measured its context). ``fault`` says
    why it cannot be used, None when it can; such a device is shown by ``doctor`` and never planned for.
    ``compute_capability`` is NVIDIA's. ``half_type`` is the 16-bit type that it computes fast in.
    """

    name: str
    kind: Literal["cuda", "xpu", "mps"]
    description: str
    total_bytes: int
    free_bytes: int
    integrated: bool = False
    compute_capability: tuple[int, int] | None = None
    half_type: Literal["bf16", "fp16"] = "bf16"
    identity: str = ""
    fault: str | None = None


def list_accelerators(torch: Any) -> list[Accelerator]:
    """Every accelerator that torch sees, in torch's order."""
    return [*_cuda(torch), *_xpu(torch), *_mps(torch)]


def _cuda(torch: Any) -> Iterable[Accelerator]:
    if not torch.cuda.is_available():
        return
    rocm = getattr(torch.version, "hip", None) is not None
    architectures = tuple(torch.cuda.get_arch_list())
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = None if rocm else (int(properties.major), int(properties.minor))
        name = f"cuda:{index}"
        yield Accelerator(
            name=name,
            kind="cuda",
            description=str(properties.name),
            total_bytes=int(properties.total_memory),
            # Asking the runtime would create the card's context, which is to be measured first (context.py).
            free_bytes=int(properties.total_memory),
            integrated=bool(getattr(properties, "is_integrated", 0)),
            compute_capability=capability,
            half_type=half_type("cuda", capability),
            identity=str(getattr(properties, "uuid", "")),
            fault=None if capability is None else build_fault(name, capability, architectures),
        )


def half_type(kind: str, compute_capability: tuple[int, int] | None = None) -> Literal["bf16", "fp16"]:
    """The 16-bit type that a kind of device computes fast in: bf16 but on Apple's and on NVIDIA's before 8.0."""
    if kind == "cuda" and compute_capability is not None and compute_capability < (8, 0):
        return "fp16"
    return "fp16" if kind == "mps" else "bf16"


def build_fault(name: str, capability: tuple[int, int], architectures: Iterable[str]) -> str | None:
    """Why this build of torch cannot run on a card of that compute capability, None when it can.

    ``architectures`` are torch's: "sm_86" is machine code for capability 8.6 and later 8.x, "compute_90" is code
    that the driver translates for 9.0 and everything later; a letter "a" ties code to exactly that capability, "f" to
    its family.
    """
    architectures = list(architectures)
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if built == capability:
            return None
        same_family = match[1] == "sm" or match[4] == "f"
        if match[4] != "a" and built <= capability and (not same_family or built[0] == capability[0]):
            return None
    if not architectures:
        return None
    version = f"{capability[0]}.{capability[1]}"
    mend = (
        "install torch 2.13 for CUDA 12.6 (cu126), the last kind of build for cards this old"
        if capability < (7, 5)
        else "install the torch build that supports it"
    )
    return f"{name} has compute capability {version}, for which this torch build has no code: {mend}"


def _xpu(torch: Any) -> Iterable[Accelerator]:
    if not hasattr(torch, "xpu") or not torch.xpu.is_available():
        return
    for index in range(torch.xpu.device_count()):
        properties = torch.xpu.get_device_properties(index)
        name = str(properties.name)
        integrated = getattr(properties, "is_integrated_gpu", None)
        yield Accelerator(
            name=f"xpu:{index}",
            kind="xpu",
            description=name,
            total_bytes=int(properties.total_memory),
            free_bytes=int(torch.xpu.mem_get_info(index)[0]),
            integrated=_DISCRETE_INTEL.search(name) is None if integrated is None else bool(integrated),
        )


def _mps(torch: Any) -> Iterable[Accelerator]:
    backend = getattr(torch.backends, "mps", None)
    if backend is None or not backend.is_available():
        return
    total = int(torch.mps.recommended_max_memory())
    yield Accelerator(
        name="mps",
        kind="mps",
        description="Apple GPU",
        total_bytes=total,
        free_bytes=max(0, total - int(torch.mps.driver_allocated_memory())),
        integrated=True,
        half_type=half_type("mps"),
    )
