"""Which code runs: measurements of other code are not this code's. Knows nothing of what is measured."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Any

SOURCES = (".py", ".c", ".cpp", ".cu", ".h", ".so")
"""Code, and what was compiled of it: a stale library is not the code beside it."""


@cache
def code_digest(*packages: str) -> str:
    """A digest of the code of those packages."""
    total = hashlib.sha256()
    for package in packages:
        files = [item for item in _files(resources.files(package)) if item.name.endswith(SOURCES)]
        for item in sorted(files, key=lambda found: found.name):
            total.update(item.name.encode() + item.read_bytes())
    return total.hexdigest()[:16]


def _files(folder: Any) -> list[Any]:
    found = []
    for item in folder.iterdir():
        found += _files(item) if item.is_dir() else [item]
    return found
