"""Which code runs: measurements of other code are not this code's. Knows nothing of what is measured."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Any

SOURCES = (".py", ".c", ".cpp", ".cu", ".cuh", ".h", ".so")
"""Code, and what was compiled of it: a stale library is not the code beside it."""

COMPUTING = ("splitrun.kernels", "splitrun.stage", "splitrun.model")
"""What decides how long a unit takes."""


@cache
def code_digest(*packages: str) -> str:
    """A digest of the code of those packages."""
    total = hashlib.sha256()
    for package in packages:
        for path, item in sorted(_files(resources.files(package)).items()):
            if path.endswith(SOURCES):
                total.update(path.encode() + item.read_bytes())
    return total.hexdigest()[:16]


def _files(folder: Any, above: str = "") -> dict[str, Any]:
    """Path within the package -> file."""
    found: dict[str, Any] = {}
    for item in folder.iterdir():
        path = f"{above}{item.name}"
        found |= _files(item, f"{path}/") if item.is_dir() else {path: item}
    return found
