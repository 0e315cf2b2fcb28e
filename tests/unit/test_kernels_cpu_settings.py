"""Names in the environment that choose processor kernels: refused in one line before anything loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from native_library import compiled_levels

import splitrun
from splitrun.errors import InvalidRequest
from splitrun.kernels.cpu import library, many
from splitrun.kernels.cpu.settings import (
    LEVEL_VARIABLE,
    LEVELS,
    NONE,
    PROMPT_KERNELS,
    PROMPT_VARIABLE,
    TORCH,
    check_settings,
)

STARTS: dict[str, Callable[[], object]] = {
    "planning": lambda: splitrun.plan("no/such-model"),
    "an engine": lambda: splitrun.Engine("no-such-placement.yaml"),
    "the level": library.kernel.__wrapped__,
    "prompts": lambda: many._chosen.__wrapped__("bf16"),
}


@pytest.mark.parametrize("variable", [LEVEL_VARIABLE, PROMPT_VARIABLE])
@pytest.mark.parametrize("start", STARTS)
def test_a_name_of_nothing_is_refused_before_anything_else(
    start: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(InvalidRequest, match=rf"^{variable} is 'nonsense': it must be one of [^\n]+, or not be set$"):
        STARTS[start]()


def test_the_command_line_says_so_in_one_line() -> None:
    command = [sys.executable, "-m", "splitrun", "run", "demo", "Hello"]
    environment = {**os.environ, PROMPT_VARIABLE: "nonsense"}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert f"{PROMPT_VARIABLE} is 'nonsense': it must be one of bf16, int8, torch" in line


def test_every_name_that_a_build_has_may_be_given() -> None:
    assert set(compiled_levels()) <= set(LEVELS)
    assert set(many.every()) <= set(PROMPT_KERNELS)
    for name in ("", NONE, *LEVELS):
        check_settings({LEVEL_VARIABLE: name})
    for name in ("", "bf16", "int8", TORCH, *PROMPT_KERNELS):
        check_settings({PROMPT_VARIABLE: name})
