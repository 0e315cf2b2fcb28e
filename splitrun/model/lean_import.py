"""Import transformers' modelling code without what it brings along for compiling and for process groups.

transformers imports torch's compiler (with sympy and triton) and its distributed tensors as soon as a model's code is
imported, which takes more than half of the time and of the memory of that import. splitrun neither compiles models nor
spreads them over a process group. Only for processes of splitrun's own: what other code in a user's process imports is
not ours to change. Whatever needs the compiler later imports it as usual. Knows no models.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from splitrun.model.import_structure import remembered

COMPILER = "torch._dynamo"
MODELLING = (
    *("transformers.modeling_utils", "transformers.generation.utils", "transformers.masking_utils"),
    *("transformers.models.auto.modeling_auto", "transformers.conversion_mapping"),
)
"""What the code of every model imports."""
MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of the compiler that change nothing where nothing is compiled."""


def import_transformers(names: tuple[str, ...] = MODELLING) -> bool:
    """Import those modules, leanly where that is still possible; whether it was.

    A transformers that cannot be imported so is left to be imported as usual.
    """
    if COMPILER in sys.modules or "transformers.modeling_utils" in sys.modules:
        return False
    before = set(sys.modules)
    try:
        with _without_collections(), _without_compiler(), _without_process_groups(), remembered():
            for name in names:
                importlib.import_module(name)
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name not in before and name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        return False
    return True


def _unchanged(function: Any = None, *arguments: Any, **keywords: Any) -> Any:
    return function if callable(function) else lambda inner: inner


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Stand in for the compiler's package. Single modules of it can be imported; its own start is what takes long."""
    import torch

    package: Any = ModuleType(COMPILER)
    package.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    for name in MARKS:
        setattr(package, name, _unchanged)
    compiler: Any = torch.compiler
    disable: Callable[..., Any] = compiler.disable
    compiler.disable = _unchanged
    sys.modules[COMPILER] = package
    torch._dynamo = package
    try:
        yield
    finally:
        compiler.disable = disable
        del sys.modules[COMPILER]
        del torch._dynamo


@contextmanager
def _without_process_groups() -> Iterator[None]:
    """Let transformers see a torch that was built without process groups, as some are."""
    import torch.distributed

    groups: Any = torch.distributed
    available = groups.is_available
    groups.is_available = lambda: False
    try:
        yield
    finally:
        groups.is_available = available


@contextmanager
def _without_collections() -> Iterator[None]:
    """Nothing that an import makes is garbage: looking for it, then and later, takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
