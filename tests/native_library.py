"""Has the compiled kernels at hand: those of the installed package, or a checkout's, compiled anew when old."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

from splitrun.kernels.cpu.library import Kernel, levels, library_path
from splitrun.measure.health import find_compiler

ROOT = Path(__file__).parent.parent


@cache
def compiled_levels() -> dict[str, Kernel]:
    """Every level that this processor runs. A checkout that the tests import from is compiled in place first."""
    import splitrun.kernels.cpu

    folder = Path(splitrun.kernels.cpu.__file__).parent
    built = library_path()
    if folder.is_relative_to(ROOT) and find_compiler() is not None:
        newest = max(path.stat().st_mtime for path in [*(folder / "source").iterdir(), ROOT / "setup.py"])
        if built is None or built.stat().st_mtime < newest:
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return levels()
