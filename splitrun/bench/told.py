"""The table of a guide that users will compare with, made for this machine: the same rows, in the same columns.

Rows are prompt lengths and weight formats; each is planned for this machine, run, and measured. Where there is no card,
all rows run on the processor. Knows nothing of what the guide claims.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splitrun.bench import contest
from splitrun.planner.placement import Placement
from splitrun.quantities import format_bytes, format_rate

ROWS = ((1024, "16 bits"), (1024, "nf4"), (512, "int8"), (256, "processor alone"))
NEW_TOKENS = 64


@dataclass(frozen=True)
class Told:
    """One row. ``error`` says why there are no figures."""

    hardware: str
    input_tokens: int
    weights: str
    device_memory_bytes: int = 0
    tokens_per_s: float = 0.0
    error: str = ""


def told_table(
    model: str,
    load: str,
    memory: dict[str, str | int] | None,
    new_tokens: int,
    repeat: int,
    report: Callable[[str], None] = lambda text: None,
) -> list[Told]:
    """Plan and run every row, which takes minutes; ``report`` is told of each."""
    rows = []
    for tokens, what in ROWS:
        report(f"planning and running {tokens} tokens, {what}")
        rows.append(_row(model, load, memory, tokens, what, new_tokens, repeat))
        report(_line(rows[-1]))
    return rows


def _row(
    model: str, load: str, memory: dict[str, str | int] | None, tokens: int, what: str, new_tokens: int, repeat: int
) -> Told:
    from splitrun.errors import PlacementError
    from splitrun.measure.probe import probe

    devices = {device.name: device for device in probe(memory).devices}
    card = next((device for device in devices.values() if device.kind != "cpu"), None)
    if what == "processor alone":
        memory, card = {"cpu": (memory or {}).get("cpu", "auto")}, None
    half = (card or next(iter(devices.values()))).compute_dtype
    weights = {"16 bits": half, "processor alone": "auto"}.get(what, what)
    shown = card or devices.get("cpu") or next(iter(devices.values()))
    options: dict[str, Any] = {"memory": memory, "context": tokens + new_tokens, "weights": weights, "load": load}
    try:
        with contest.other_process() as process:
            placement = contest.plan_in(process, model, options)
    except PlacementError as error:
        return Told(shown.description, tokens, weights, error=str(error))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "placement.yaml")
        placement.save(file)
        (result,) = contest.hold(contest.make_terms(placement, file, tokens, new_tokens, repeat, load), ())
    hardware = ", ".join(devices[name].description for name in placement.device_names)
    peak = result.peak_bytes.get(card.name if card and placement.has_device(card.name) else "cpu", 0)
    return Told(hardware, tokens, formats_of(placement), peak, result.decode_tokens_per_s, result.error or "")


def formats_of(placement: Placement) -> str:
    """ "nf4", or "bf16 + nf4" where stages differ."""
    return " + ".join(dict.fromkeys(stage.weights for stage in placement.stages))


def to_text(rows: Sequence[Told]) -> str:
    """Markdown, so that it can be put beside other people's."""
    lines = ["| hardware | input | weights | device memory | tok/s |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Told) -> str:
    figures = (format_bytes(row.device_memory_bytes), format_rate(row.tokens_per_s).removesuffix(" tok/s"))
    cells = (row.error, "–") if row.error else figures
    return f"| {row.hardware} | {row.input_tokens} | {row.weights} | {cells[0]} | {cells[1]} |"


def to_json(rows: Iterable[Told]) -> list[dict[str, Any]]:
    """For the last line of the output."""
    return [asdict(row) for row in rows]
