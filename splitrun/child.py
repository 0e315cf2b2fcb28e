"""How a process of splitrun's own is started: this interpreter, this package, and nothing from the current folder.

``python -m`` would import from the folder that the user stands in, whose ``json.py`` may be anyone's. Knows nothing of
what the processes do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGE_HOME = Path(__file__).resolve().parent.parent
SECRETS = ("SPLITRUN_TOKEN", "SPLITRUN_API_KEY")
"""What the command line takes from its environment. Children are told by pipes and files what they need of it."""


def child_command(module: str) -> list[str]:
    """The command line that runs a module of splitrun in another process."""
    return [sys.executable, "-P", "-m", module]


def child_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of such a process: it finds the package that runs here, installed or not, and no secrets."""
    # An empty entry would mean the current folder.
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    passed = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return passed | {"PYTHONPATH": os.pathsep.join([str(PACKAGE_HOME), *entries])} | dict(changes or {})


@contextmanager
def safe_spawning() -> Iterator[None]:
    """While inside, processes that ``multiprocessing`` starts import nothing from the current folder either.

    Changes this process's environment for that time.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
