"""Run contestants one after the other, each in a fresh process, on the same terms; compare and show.

This process itself loads nothing and opens no card, so that its memory is in nobody's figures. Knows how to start a
contestant, not what one does.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from splitrun.bench.terms import Result, Terms, ratios
from splitrun.child import child_command, child_environment, safe_spawning
from splitrun.planner.estimate import Estimate
from splitrun.planner.placement import Placement
from splitrun.quantities import format_bytes, format_rate, format_seconds, rate_figure

FOREIGN = ("accelerate", "transformers", "transformers-fp32", "bitsandbytes")


@contextmanager
def other_process() -> Iterator[Executor]:
    """A process to plan and predict in: both open cards, whose contexts would take memory from the contestants.

    Ctrl-C ends it at once and without a word: this process has its own.
    """
    quietly: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with safe_spawning(), ProcessPoolExecutor(1, get_context("spawn"), **quietly) as process:
        yield process


def plan_in(process: Executor, model: str, options: dict[str, Any]) -> Placement:
    """``api.plan(model, **options)`` in that process."""
    from splitrun.api import plan

    return process.submit(plan, model, **options).result()


def check_in(process: Executor, placement: Placement, file: str, load: Literal["weights", "dummy"]) -> None:
    """``api.check`` in that process: raises InvalidPlacement for a stale placement."""
    from splitrun.api import check

    process.submit(check, placement, file, load=load).result()


def predict_in(process: Executor, placement: Placement, terms: Terms) -> Estimate:
    """``api.predict`` on the terms of the contest, in that process."""
    from splitrun.api import predict

    load: Literal["weights", "dummy"] = "dummy" if terms.load == "dummy" else "weights"
    return process.submit(predict, placement, terms.prompt_tokens, terms.new_tokens, load).result()


def against(predicted: Estimate, result: Result) -> list[str]:
    """What was predicted beside what was measured, with each error; nothing for a contestant that failed."""
    if result.error or not result.decode_tokens_per_s:
        return []
    low, high = map(rate_figure, predicted.decode_interval)
    soon, late = map(format_seconds, predicted.first_token_interval)
    decode = predicted.decode_tokens_per_s / result.decode_tokens_per_s - 1
    first = predicted.time_to_first_token_s / max(result.ttft_s, 1e-9) - 1
    return [
        f"decode       predicted {format_rate(predicted.decode_tokens_per_s)} ({low} to {high}), measured "
        f"{format_rate(result.decode_tokens_per_s)}: {decode:+.0%}",
        f"first token  predicted {format_seconds(predicted.time_to_first_token_s)} ({soon} to {late}), measured "
        f"{format_seconds(result.ttft_s)}: {first:+.0%}",
    ]


def make_terms(placement: Placement, file: Path, prompt_tokens: int, new_tokens: int, repeat: int, load: str) -> Terms:
    """The terms for a placement that is saved in ``file``."""
    from splitrun.model.files import resolve

    files = resolve(placement.model.source, placement.model.revision, weights=load == "weights")
    return Terms(
        contestant="splitrun",
        model=str(files.path),
        placement_file=str(file),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeat=repeat,
        load=load,
        budgets=dict(placement.devices),
        vocabulary=int(files.config.get_text_config(decoder=True).vocab_size),
    )


def hold(terms: Terms, others: Iterable[str]) -> list[Result]:
    """The results of splitrun and the others, in that order. A contestant that fails has an ``error``."""
    return [_play(replace(terms, contestant=name)) for name in ("splitrun", *others)]


def _play(terms: Terms) -> Result:
    command, given = child_command("splitrun.bench.contestant"), json.dumps(terms.to_json())
    outcome = subprocess.run(
        command, input=given, stdout=subprocess.PIPE, text=True, check=False, env=child_environment(),
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends that one
    )  # fmt: skip
    lines = outcome.stdout.splitlines()
    if outcome.returncode != 0 or not lines:
        error = f"the process ended with status {outcome.returncode} and no result"
        if outcome.returncode == -9:
            error += ": the system killed it, most likely for memory"
        return Result(terms.contestant, terms.prompt_tokens, terms.new_tokens, error=error)
    return Result(**json.loads(lines[-1]))


def to_json(results: list[Result], predicted: Estimate | None = None) -> dict[str, Any]:
    """splitrun's figures at the top, what was predicted of them, or None, and the others under "vs", with ratios above
    1 where splitrun is better."""
    own, *others = results
    versus = {other.contestant: other.to_json() | {"ratios": ratios(own, other)} for other in others}
    foretold = None
    if predicted is not None:
        low, high = predicted.decode_interval
        foretold = {
            "ttft_s": predicted.time_to_first_token_s,
            "decode_tokens_per_s": predicted.decode_tokens_per_s,
            "decode_at_least": low,
            "decode_at_most": high,
        }
    return own.to_json() | {"predicted": foretold, "vs": versus}


def to_table(results: list[Result]) -> str:
    """Rows to read: one per contestant."""
    rows = [("", "first token", "prompt", "decode", "load", "peak above start")]
    for result in results:
        if result.error:
            rows.append((result.contestant, f"failed: {result.error}", "", "", "", ""))
            continue
        peaks = ", ".join(f"{device} {format_bytes(peak)}" for device, peak in result.peak_bytes.items())
        rows.append(
            (
                result.contestant,
                format_seconds(result.ttft_s),
                format_rate(result.prefill_tokens_per_s),
                format_rate(result.decode_tokens_per_s),
                format_seconds(result.load_s),
                peaks,
            )
        )
    whole = [row for row in rows if not row[1].startswith("failed")]
    widths = [max(len(row[column]) for row in whole) for column in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
