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


AMPERE = "80,bf16,32,dense,int8,nf4"
SMALL = {f"75,fp16,{library.USUAL_WIDTH},dense": 64 << 10, f"86,fp16,{library.MOST_WIDTH},dense": 99 << 10}
"""Cards with the widest heads that they take -> the shared memory that they have."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Card -> kernel -> the most shared memory that it takes, in bytes."""
    script, folder = Path(__file__).with_name("compile_triton.py"), str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # on a card other kernels take the place of some
    command = [sys.executable, str(script), AMPERE, *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = {}
    for card, name, size in map(str.split, done.stdout.splitlines()):
        found.setdefault(card, {})[name] = int(size)
    return found


def test_all_kernels_compile(shared: dict[str, dict[str, int]]) -> None:
    assert set(shared[AMPERE]) == KERNELS


@pytest.mark.parametrize("card", SMALL)
def test_the_widest_heads_have_room_on_small_multiprocessors(card: str, shared: dict[str, dict[str, int]]) -> None:
    assert max(shared[card].values()) <= SMALL[card], shared[card]
    assert shared[card]["_prompt"] > SMALL[card] // 2  # it is this that limits the width


def test_wide_heads_are_for_cards_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda:0")
    for capability, width in (((7, 5), 128), ((8, 0), 256), ((12, 0), 256)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert library.widest(card) == width
