"""The C library under AddressSanitizer and UndefinedBehaviorSanitizer, and its Arm level under an emulator."""

from __future__ import annotations

import ast
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native_library import compiled_levels

from splitrun.measure.health import find_compiler

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "splitrun/kernels/cpu/source"
CHECK = ROOT / "tests/native/check.c"
COMMON = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE}"]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


def flags_by_family() -> dict[str, dict[str, list[str]]]:
    """What setup.py compiles each level with."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LEVELS":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no LEVELS")


def build(compiler: str, family: str, options: list[str], folder: Path) -> Path:
    levels = flags_by_family().get(family, {})
    others = {name for flags in flags_by_family().values() for name in flags} - set(levels)
    macros = [f"-DHAVE_{Path(name).stem.upper()}" for name in levels]
    objects = []
    for path in (*sorted(SOURCE.glob("*.c")), CHECK):
        if path.name in others:
            continue
        objects.append(folder / f"{path.stem}.o")
        command = [compiler, *options, *COMMON, *macros, *levels.get(path.name, []), "-c", str(path)]
        subprocess.run([*command, "-o", str(objects[-1])], check=True, timeout=200)
    program = folder / "check"
    subprocess.run([compiler, *options, *map(str, objects), "-o", str(program)], check=True, timeout=200)
    return program


def compiles(compiler: str, options: list[str], folder: Path) -> bool:
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }")
    command = [compiler, *options, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, check=False, capture_output=True, timeout=100).returncode == 0


def test_under_sanitizers(tmp_path: Path) -> None:
    compiler = find_compiler()
    options = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if compiler is None or not compiles(compiler, options, tmp_path):
        pytest.skip("no C compiler with sanitizers")
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    program = build(compiler, machine, options, tmp_path)
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    assert set(compiled_levels()) <= set(run.stdout.split())


@pytest.mark.skipif(not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)), reason="no Arm compiler or emulator")
def test_arm_under_an_emulator(tmp_path: Path) -> None:
    program = build(CROSS_COMPILER, "aarch64", ["-O3", "-static"], tmp_path)
    run = subprocess.run([EMULATOR, str(program)], check=False, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == ["neon", "portable"]
