"""Versions of everything below splitrun that a measured second depends on: driver, system, libraries; and which of the
processor's kernels the environment asks for.

A measurement made under others is made again. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib import metadata

from splitrun.kernels.cpu.settings import LEVEL_VARIABLE, PROMPT_VARIABLE

LIBRARIES = ("torch", "transformers", "triton", "bitsandbytes", "numpy")


def versions(kind: str) -> tuple[str, ...]:
    """What a figure measured on a device of that kind is valid for: "torch 2.13.0", "driver 570.1", …"""
    asked = (f"{name}={os.environ[name]}" for name in (LEVEL_VARIABLE, PROMPT_VARIABLE) if os.environ.get(name))
    return (*_installed(kind), *asked) if kind == "cpu" else _installed(kind)


@cache
def _installed(kind: str) -> tuple[str, ...]:
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
