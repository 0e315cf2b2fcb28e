"""A placement that runs one round whenever it is told to: the other half of ``predictions.py``, in its own process.

Writes an empty JSON line when it has imported what it needs. Reads JSON lines: the terms first, then one line per round
with the lengths of prompt and answer. Writes one JSON line for each: the bytes held before loading, when it has loaded,
then the moments of each round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from splitrun.bench.memory import MemoryMeter
from splitrun.bench.own import play_round
from splitrun.bench.terms import Round, Terms
from splitrun.child import child_environment
from splitrun.engine.engine import Engine
from splitrun.planner.placement import Placement


class Turns:
    """The process of a placement, as its parent sees it."""

    def __init__(self) -> None:
        """Start it and wait until it has imported what it needs: no card yet. Raises SystemExit when it cannot."""
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment()
        )
        self._rounds = 0
        self._answer()

    def load(self, terms: Terms, card: int | None = None) -> int:
        """Load the placement; ``card`` is the only one that the process sees, as its first. The bytes that it held
        before. Raises SystemExit when it does not load."""
        held: int = self._ask(terms.to_json() | {"card": card})["start_bytes"]
        return held

    def round(self, prompt_tokens: int, new_tokens: int) -> Round:
        """Play one round."""
        self._rounds += 1
        answer = self._ask({"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "number": self._rounds})
        return Round(**answer["round"])

    def rounds(self, prompt_tokens: int, new_tokens: int, sessions: int) -> None:
        """Play that many rounds at once."""
        self._rounds += sessions
        more = {"number": self._rounds, "sessions": sessions}
        self._ask({"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, **more})

    @property
    def process(self) -> int:
        """Its id."""
        return self._process.pid

    def peak_bytes(self) -> Mapping[str, int]:
        """Device -> most bytes held so far."""
        found: Mapping[str, int] = self._ask({})["peak_bytes"]
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the placement's process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """The process itself."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import transformers.modeling_utils  # noqa: F401  imports come before the meter, which counts what comes after

    say(out, {})
    given = json.loads(sys.stdin.readline())
    card = given.pop("card")
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(card)  # read when the first card is opened: nothing has yet
    terms = Terms(**given)
    placement = Placement.load(terms.placement_file)
    meter = MemoryMeter(terms.budgets)
    with Engine(placement, load="dummy" if terms.load == "dummy" else "weights") as engine:
        say(out, {"start_bytes": meter.start_bytes})
        for line in sys.stdin:
            wanted = json.loads(line)
            if not wanted:
                say(out, {"peak_bytes": meter.peak_bytes()})
                continue
            number, sessions = wanted.pop("number"), wanted.pop("sessions", 1)
            play = partial(play_round, engine.core, replace(terms, **wanted))
            with ThreadPoolExecutor(sessions) as pool:
                played = list(pool.map(play, range(number - sessions + 1, number + 1)))
            say(out, {"round": asdict(played[-1])})


def say(out: TextIO, answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
