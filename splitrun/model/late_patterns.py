"""Compile the patterns of transformers' conversion table when they are used, not when the table is made.

The table has the renamings of every architecture, nearly a thousand patterns, of which a model uses a few; compiling
them all takes a twentieth of a later start. Knows no models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class LatePattern:
    """What ``re.compile`` would return, made at the first use."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._wanted = (pattern, flags)

    def __getattr__(self, name: str) -> Any:
        """Only asked for what is not there yet: a pattern's names are set with the first."""
        if name.startswith("_"):
            raise AttributeError(name)
        compiled = re.compile(*self._wanted)
        vars(self).update((known, getattr(compiled, known)) for known in dir(compiled) if not known.startswith("_"))
        return getattr(compiled, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatePattern:
        return self


class _LateModule(ModuleType):
    """``re`` with late patterns."""

    def __init__(self) -> None:
        super().__init__("re")
        vars(self).update(vars(re), compile=LatePattern)


@contextmanager
def compiled_late(module: ModuleType) -> Iterator[None]:
    """While open, what a module that imports ``re`` compiles is a `LatePattern`."""
    if getattr(module, "re", None) is not re:
        yield
        return
    vars(module)["re"] = _LateModule()
    try:
        yield
    finally:
        vars(module)["re"] = re
