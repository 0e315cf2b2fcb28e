"""Benchmarks refuse a place where they could not write before they run, and not after minutes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parent.parent / "bench"
INTO_FILES = ("budgets", "hops", "side_by_side", "soak", "solver", "split")
INTO_FOLDERS = ("operators", "predictions deepseek-1.5b")


@pytest.mark.parametrize("bench", INTO_FILES)
def test_a_folder_is_refused_where_a_file_is_wanted(bench: str, tmp_path: Path) -> None:
    assert refused(bench, tmp_path) == f"{tmp_path}: cannot be written: it is a folder; name another file with -o FILE"


@pytest.mark.parametrize("bench", INTO_FOLDERS)
def test_a_file_is_refused_where_a_folder_is_wanted(bench: str, tmp_path: Path) -> None:
    file = tmp_path / "there"
    file.touch()
    assert refused(bench, file) == f"{file} can be no folder: File exists; name another"


def test_every_bench_with_an_output_is_tried() -> None:
    found = {file.stem for file in BENCHES.glob("*.py") if re.search(r'add_argument\(\s*"-o"', file.read_text("utf-8"))}
    assert found == {bench.split()[0] for bench in (*INTO_FILES, *INTO_FOLDERS)}


def refused(bench: str, place: Path) -> str:
    """What a benchmark says of that output, having run nothing."""
    name, *words = bench.split()
    command = [sys.executable, str(BENCHES / f"{name}.py"), *words, "-o", str(place)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    return ended.stderr.splitlines()[-1].partition(": error: argument -o")[2].partition(": ")[2]
