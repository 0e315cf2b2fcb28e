"""A plan in plain text: the stages as a table, the memory of each device as a bar, the predictions, and the reasons.

Reads only the placement and its estimate; knows no terminal, no colour.
"""

from __future__ import annotations

from collections.abc import Sequence

from splitrun.planner.cost import estimate as make_estimate
from splitrun.planner.estimate import DeviceMemory, Estimate
from splitrun.planner.facts import Cluster, ModelProfile
from splitrun.planner.placement import Placement
from splitrun.quantities import format_bytes, format_rate, format_seconds, rate_figure

BAR_WIDTH = 40
_MARKS = "█▓+▒░:-"
_LEGEND = ("weights", "KV", "kept for recovery", "workspace", "process or context", "allocator", "margin")


def explain(placement: Placement, profile: ModelProfile | None = None, cluster: Cluster | None = None) -> str:
    """The plan in words. With ``profile`` and ``cluster`` figures are made anew, else the stored ones are shown."""
    stored = placement.estimate
    if profile is not None and cluster is not None:
        limit, notes = (stored.limit, stored.notes) if stored else ("", ())
        stored = make_estimate(profile, cluster, placement, limit, notes)
    workload = placement.workload
    sessions = f"{workload.sessions} session" + "s" * (workload.sessions != 1)
    title = (
        f"{placement.model.source} · {placement.layers} layers · {sessions} of {workload.context:,} tokens · "
        f"planned for {workload.objective}"
    )
    if stored is None:
        note = "No estimate is stored. For one: splitrun plan " + placement.model.source
        return "\n".join([title, "", *_bare_table(placement), "", note])
    parts = [title, "", *_table(stored), ""]
    width = max(8, *(len(memory.device) for memory in stored.devices))
    for memory in stored.devices:
        parts += _bar(memory, width)
    keeping = any(memory.kept_bytes for memory in stored.devices)
    shown = [(mark, name) for name, mark in zip(_LEGEND, _MARKS, strict=True) if keeping or mark != "+"]
    legend = "  ".join(f"{mark} {name}" for mark, name in shown)
    parts += [f"  {legend}  · free", "", *_predictions(stored)]
    return "\n".join(parts)


def _predictions(stored: Estimate) -> list[str]:
    slow, fast = stored.decode_interval
    soon, late = stored.first_token_interval
    decode, first = "", ""
    if stored.spread:
        decode = f", {rate_figure(slow)} to {format_rate(fast)}"
        first = f", {format_seconds(soon)} to {format_seconds(late)}"
    lines = [
        f"Predicted   {format_rate(stored.decode_tokens_per_s)} decoding ({format_seconds(stored.step_s)} per token "
        f"after {stored.history_tokens:,} tokens{decode})",
        f"            first token of a {stored.prompt_tokens:,}-token prompt after "
        f"{format_seconds(stored.time_to_first_token_s)} ({format_rate(stored.prefill_tokens_per_s)}{first})",
    ]
    if stored.sessions > 1:
        rate = format_rate(stored.throughput_tokens_per_s)
        how = f"in {stored.streams} groups by turns" if stored.streams > 1 else "in one step"
        lines.append(f"            {rate} for all {stored.sessions} sessions together, {how}")
    if stored.limit:
        lines.append(f"Limited by  {stored.limit}")
    return lines + [f"Note        {note}" for note in stored.notes]


def _table(stored: Estimate) -> list[str]:
    header = ("stage", "device", "units", "format", "weights", "KV", "per token", "hop")
    rows = [
        (
            str(index),
            stage.device,
            stage.units,
            stage.weights,
            format_bytes(stage.weight_bytes),
            format_bytes(stage.kv_bytes),
            format_seconds(stage.decode_s),
            format_seconds(stage.hop_s) if stage.hop_s else "",
        )
        for index, stage in enumerate(stored.stages)
    ]
    return _aligned([header, *rows], right={0, 4, 5, 6, 7})


def _bare_table(placement: Placement) -> list[str]:
    rows = [(str(index), stage.device, stage.units_text, stage.weights) for index, stage in enumerate(placement.stages)]
    return _aligned([("stage", "device", "units", "format"), *rows], right={0})


def _aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _bar(memory: DeviceMemory, width: int) -> list[str]:
    """The device's bar against its budget, and its items in figures."""
    scale = max(memory.budget_bytes, memory.total_bytes, 1)
    bar, edge, drawn = "", 0, 0
    for (_, amount), mark in zip(memory.items(), _MARKS, strict=True):
        edge += amount
        until = round(edge / scale * BAR_WIDTH)
        bar, drawn = bar + mark * (until - drawn), until
    bar = bar.ljust(BAR_WIDTH, "·")
    beyond = memory.total_bytes - memory.budget_bytes
    over = f": {format_bytes(beyond)} TOO MUCH" if beyond > 0 else ""
    figures = [f"{name} {format_bytes(amount)}" for name, amount in memory.items() if amount]
    total = f"{format_bytes(memory.total_bytes)} of {format_bytes(memory.budget_bytes)}{over}"
    return [
        f"  {memory.device:<{width}} {bar}  {total}",
        f"  {'':<{width}} {' · '.join(figures[:3])}",
        f"  {'':<{width}} {' · '.join(figures[3:])}",
        "",
    ]
