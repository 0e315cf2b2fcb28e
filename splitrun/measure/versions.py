"""Versions of everything below splitrun that a measured second depends on: driver, system, libraries.

A measurement made under others is made again. Knows nothing of what is measured.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

LIBRARIES = ("torch", "transformers", "triton", "bitsandbytes", "numpy")


@cache
def versions(kind: str) -> tuple[str, ...]:
    """What a figure measured on a device of that kind is valid for: "torch 2.13.0", "driver 570.1", …"""
    found = [f"{platform.system()} {platform.release()} {platform.machine()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    driver = driver_version() if kind == "cuda" else None
    return (*found, f"driver {driver}") if driver else tuple(found)


def driver_version() -> str | None:
    """The NVIDIA driver's, None without one."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
