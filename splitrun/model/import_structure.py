"""Remembers which names transformers' model files export.

transformers reads all of them, more than a thousand, twice while it is imported, which takes half of that import. What
it found is kept for the installed version and the state of its folders. Knows no models.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from splitrun.folders import cache_folder

MODULE = "transformers.utils.import_utils"
FUNCTION = "define_import_structure"
Structure = dict[frozenset[str], dict[str, set[str]]]
"""What has to be installed -> module -> the names that it exports then."""


@contextmanager
def remembered() -> Iterator[None]:
    """While open, transformers that is imported finds what it found before."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module as usual, and replaces its function once it was run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == MODULE else None
        if spec is None or spec.loader is None:
            return None
        run: Callable[[ModuleType], None] = spec.loader.exec_module

        def run_and_replace(module: ModuleType) -> None:
            run(module)
            if hasattr(module, FUNCTION):
                setattr(module, FUNCTION, _remembering(getattr(module, FUNCTION)))

        vars(spec.loader)["exec_module"] = run_and_replace
        return spec


def _remembering(look: Callable[[str], Structure]) -> Callable[[Any, str | None], Structure]:
    """The function that looks through the files, for one folder of models from memory where it is the same."""
    known: dict[str, list[Any]] = {}

    def define(module_path: Any, prefix: str | None = None) -> Structure:
        path = Path(module_path)
        folder = path.parent if path.suffix else path
        if folder.name != "models":
            found = look(str(module_path))
        else:
            if str(folder) not in known:
                known[str(folder)] = _kept(folder, look)
            found = {frozenset(wanted): {name: set(own) for name, own in names} for wanted, names in known[str(folder)]}
        start = "" if prefix is None else f"{prefix}."
        return {wanted: {start + name: own for name, own in names.items()} for wanted, names in found.items()}

    return define


def _kept(folder: Path, look: Callable[[str], Structure]) -> list[Any]:
    """What the files of the folder export, as plain lists: as kept, if nothing was added, replaced or removed since."""
    file = cache_folder() / "import_structure.json"
    state = _state(folder)
    try:
        kept = json.loads(file.read_bytes())
        if kept["state"] == state:
            return list(kept["names"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing kept, or nothing that can be read: made again
    names = _plain(look(str(folder)))
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"state": state, "names": names}))
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
    return names


def _plain(found: Structure) -> list[Any]:
    return [[sorted(wanted), [[name, sorted(own)] for name, own in names.items()]] for wanted, names in found.items()]


def _state(folder: Path) -> list[Any]:
    """Version, and times of the folders: files that are added, replaced or removed change them."""
    try:
        own = version("transformers")
    except PackageNotFoundError:
        own = ""
    with os.scandir(folder) as entries:
        times = sorted([entry.name, entry.stat().st_mtime_ns] for entry in entries if entry.is_dir())
    return [own, str(folder), folder.stat().st_mtime_ns, times]
