"""Every Triton kernel compiles for a card that is not here: the interpreter takes what compilers refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from splitrun.kernels.gpu import library

KERNELS = {
    "_norm",
    "_place",
    "_decode",
    "_merge",
    "_prompt",
    "_gate",
    "_product",
    "_unpack",
    "_unpack_tiled",
    "_gather",
    "_take",
    "_deliver",
}


def compiled(folder: Path, *words: str) -> dict[str, int]:
    """Kernel -> the most shared memory that it takes, in bytes."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # on a card other kernels take the place of some
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}


def test_all_kernels_compile(tmp_path: Path) -> None:
    assert set(compiled(tmp_path, "80", "bf16", "32", "dense", "int8", "nf4")) == KERNELS


@pytest.mark.parametrize(
    ("capability", "width", "most"), [("75", library.USUAL_WIDTH, 64 << 10), ("86", library.MOST_WIDTH, 99 << 10)]
)
def test_the_widest_heads_have_room_on_small_multiprocessors(
    capability: str, width: int, most: int, tmp_path: Path
) -> None:
    found = compiled(tmp_path, capability, "fp16", str(width), "dense")
    assert max(found.values()) <= most, found
    assert found["_prompt"] > most // 2  # it is this that limits the width


def test_wide_heads_are_for_cards_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda:0")
    for capability, width in (((7, 5), 128), ((8, 0), 256), ((12, 0), 256)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert library.widest(card) == width
