"""The C library under sanitizers (of addresses, undefined behaviour, threads), and its Arm level under an emulator."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from native_library import compiled_levels

from splitrun.measure.health import find_compiler

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "splitrun/kernels/cpu/source"
CHECK = ROOT / "tests/native/check.c"
CHECK_LAYERS = ROOT / "tests/native/check_layers.c"
CHECK_MANY = ROOT / "tests/native/check_many.c"
EMULATION = ['-DSPLITRUN_EMULATED_TILES="emulated_tiles.h"', f"-I{ROOT / 'tests/native'}"]
EMULATED = "amx.c"
"""The source that the emulation changes."""
MOST_S = 550
"""Threads that wait for each other in turns take ten times as long on a machine with other work."""
pytestmark = pytest.mark.timeout(MOST_S + 50)
UNAVAILABLE = 77
"""Status of a check that this processor cannot run."""
COMMON = [
    "-std=c11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wall",
    "-Wextra",
    "-Werror",
    f"-I{SOURCE}",
]
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
"""Debian has them in gcc-aarch64-linux-gnu with libc6-dev-arm64-cross, and in qemu-user or qemu-user-static."""


def flags_by_family() -> dict[str, dict[str, list[str]]]:
    """What setup.py compiles each level with."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LEVELS":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no LEVELS")


def compile_all(compiler: str, family: str, options: list[str], folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The objects of the sources that the family of processors has, compiled side by side."""
    levels = flags_by_family().get(family, {})
    others = {name for flags in flags_by_family().values() for name in flags} - set(levels)
    macros = [f"-DHAVE_{Path(name).stem.upper()}" for name in levels]

    def compile_one(path: Path) -> Path:
        target = folder / f"{path.stem}.o"
        command = [compiler, *options, *COMMON, *macros, *levels.get(path.name, []), "-c", str(path)]
        subprocess.run([*command, "-o", str(target)], check=True, timeout=200)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, (path for path in paths if path.name not in others)))


def link(compiler: str, options: list[str], objects: Sequence[Path], folder: Path) -> Path:
    program = folder / "check"
    command = [compiler, *options, *map(str, objects), "-pthread", "-lm", "-o", str(program)]
    subprocess.run(command, check=True, timeout=200)
    return program


@dataclass(frozen=True)
class Compiled:
    """The library's objects, with what they were compiled with."""

    compiler: str
    family: str
    options: list[str]
    objects: list[Path]

    def program(self, check: Path, folder: Path, emulation: Sequence[str] = ()) -> Path:
        """The check linked with the library, in which what emulation changes is compiled again."""
        options, changed = [*self.options, *emulation], [SOURCE / EMULATED] if emulation else []
        again = compile_all(self.compiler, self.family, options, folder, [*changed, check])
        names = {path.name for path in again}
        kept = [path for path in self.objects if path.name not in names]
        return link(self.compiler, self.options, [*kept, *again], folder)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Skips the test where no compiler has the sanitizers."""
    folder, compiler = tmp_path_factory.mktemp("sanitized"), find_compiler()
    options = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if compiler is None or not compiles(compiler, options, folder):
        pytest.skip("no C compiler with sanitizers")
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    objects = compile_all(compiler, machine, options, folder, sorted(SOURCE.glob("*.c")))
    return Compiled(compiler, machine, options, objects)


def compiles(compiler: str, options: list[str], folder: Path) -> bool:
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }")
    command = [compiler, *options, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, check=False, capture_output=True, timeout=100).returncode == 0


def test_under_sanitizers(sanitized: Compiled, tmp_path: Path) -> None:
    program = sanitized.program(CHECK, tmp_path)
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=MOST_S)
    assert run.returncode == 0, run.stdout + run.stderr
    assert set(compiled_levels()) <= set(run.stdout.split())


def test_layers_under_sanitizers(sanitized: Compiled, tmp_path: Path) -> None:
    program = sanitized.program(CHECK_LAYERS, tmp_path)
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=MOST_S)
    assert run.returncode == 0, run.stdout + run.stderr
    assert set(compiled_levels()) <= set(run.stdout.split())


def test_teams_under_the_sanitizer_of_threads(tmp_path: Path) -> None:
    compiler, options = find_compiler(), ["-O1", "-g1", "-fsanitize=thread"]
    if compiler is None or not compiles(compiler, options, tmp_path):
        pytest.skip("no C compiler with the sanitizer of threads")
    paths = [*sorted(SOURCE.glob("*.c")), CHECK_LAYERS]
    objects = compile_all(compiler, "portable", [*options, "-DTEAMS_ONLY"], tmp_path, paths)
    program = link(compiler, options, objects, tmp_path)
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=MOST_S)
    assert (run.returncode, run.stdout) == (0, "portable\n"), run.stdout + run.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="tile instructions are x86's")
def test_products_of_many_rows_under_sanitizers_with_emulated_tiles(sanitized: Compiled, tmp_path: Path) -> None:
    program = sanitized.program(CHECK_MANY, tmp_path, EMULATION)
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=MOST_S)
    if run.returncode == UNAVAILABLE:
        pytest.skip("no AVX2 here")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The library for Arm, without sanitizers. Skips the test where it cannot be compiled or run."""
    if CROSS_COMPILER is None or EMULATOR is None:
        pytest.skip(f"no Arm {'compiler' if CROSS_COMPILER is None else 'emulator'} here")
    options = ["-O3", "-static"]
    objects = compile_all(
        CROSS_COMPILER, "aarch64", options, tmp_path_factory.mktemp("arm"), sorted(SOURCE.glob("*.c"))
    )
    return Compiled(CROSS_COMPILER, "aarch64", options, objects)


@pytest.mark.parametrize("check", [CHECK, CHECK_LAYERS])
def test_arm_under_an_emulator(arm: Compiled, check: Path, tmp_path: Path) -> None:
    assert EMULATOR is not None, "the fixture skips without one"
    program = arm.program(check, tmp_path)
    run = subprocess.run([EMULATOR, str(program)], check=False, capture_output=True, text=True, timeout=MOST_S)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == ["neon", "portable"]
