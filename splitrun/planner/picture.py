"""A placement as a picture (SVG): the model's units from left to right, coloured by device, over a bar per device.

Reads the placement and its estimate; knows no machine and no browser.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from shlex import quote

from splitrun.errors import InvalidPlacement
from splitrun.planner.destination import write_whole
from splitrun.planner.estimate import DeviceMemory, Estimate
from splitrun.planner.placement import Placement
from splitrun.quantities import format_bytes, format_rate, format_seconds, rate_figure

WIDTH, MARGIN, TOP = 960, 32, 96
UNIT_HEIGHT, BAR_HEIGHT, ROW, LABEL_ROW = 64, 22, 74, 18
COLOURS = ("#3b6ea5", "#b55a00", "#33794a", "#a4508b", "#6f6152", "#b84340", "#187a6f", "#6a5acd")
"""Dark enough to be read as text on white: a contrast of 4.5 and more."""
TITLE_LETTERS = 70
"""What fits into the width, about."""
ITEMS = (
    ("weights", "#27374d"),
    ("KV", "#5b86b5"),
    ("kept for recovery", "#8fb39a"),
    ("workspace", "#9db8d2"),
    ("process or context", "#c9b79c"),
    ("allocator", "#8a7f6d"),
    ("margin", "#e4dccf"),
)


def save_picture(placement: Placement, file: Path) -> None:
    """Draw into that file. Raises InvalidPlacement when it cannot be written, and what ``draw`` raises."""
    write_whole(file, draw(placement), "--svg")


def draw(placement: Placement) -> str:
    """The picture's text. Raises InvalidPlacement for a placement without an estimate."""
    stored = placement.estimate
    if stored is None:
        raise InvalidPlacement(
            "the placement has no estimate to draw; plan again with: "
            f"splitrun plan {quote(placement.model.source)} --svg FILE"
        )
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(placement.device_names)}
    labels, rows = _labels(placement, stored, colours)
    bars = TOP + UNIT_HEIGHT + 36 + LABEL_ROW * rows
    height = bars + ROW * len(stored.devices) + 40
    title = _title(placement)
    low, high = map(rate_figure, stored.decode_interval)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="14" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(MARGIN, 40, title, 20, weight=600),
        _text(
            MARGIN,
            66,
            f"{format_rate(stored.decode_tokens_per_s)} ({low}–{high}) decoding · first token of "
            f"{stored.prompt_tokens:,} after {format_seconds(stored.time_to_first_token_s)}",
            15,
            "#444444",
        ),
        *_units(placement, colours),
        *labels,
    ]
    for row, memory in enumerate(stored.devices):
        lines += _memory(memory, bars + ROW * row, colours[memory.device])
    lines += [*_legend(bars + ROW * len(stored.devices) + 6), "</svg>", ""]
    return "\n".join(lines)


def _title(placement: Placement) -> str:
    """Model and sizes; of a name that is too long for a line, the end."""
    workload = placement.workload
    sizes = f": {placement.layers} layers, {workload.sessions} × {workload.context:,} tokens"
    source, room = placement.model.source, TITLE_LETTERS - len(sizes)
    return (source if len(source) <= room else "…" + source[1 - room :]) + sizes


def _units(placement: Placement, colours: dict[str, str]) -> list[str]:
    """One box per unit, in the colour of its device."""
    step = (WIDTH - 2 * MARGIN) / (placement.layers + 2)
    return [
        f'<rect x="{MARGIN + unit * step:.1f}" y="{TOP}" width="{max(step - 1.5, 1):.1f}" height="{UNIT_HEIGHT}" '
        f'rx="2" fill="{colours[stage.device]}"/>'
        for stage in placement.stages
        for unit in stage.units
    ]


def _labels(placement: Placement, stored: Estimate, colours: dict[str, str]) -> tuple[list[str], int]:
    """A label below each stage, in the first row with room for it; and the number of rows."""
    step = (WIDTH - 2 * MARGIN) / (placement.layers + 2)
    lines, ends = [], [0.0]
    for stage, figures in zip(placement.stages, stored.stages, strict=True):
        label = f"{stage.device}: {stage.units_text} · {stage.weights} · {format_seconds(figures.decode_s)}"
        width = 7.2 * len(label)
        left = max(min(MARGIN + stage.units.start * step, WIDTH - MARGIN - width), MARGIN)
        row = next((row for row, end in enumerate(ends) if end <= left), len(ends))
        ends[row:] = [left + width + 12, *ends[row + 1 :]]
        top = TOP + UNIT_HEIGHT + 20 + LABEL_ROW * row
        lines.append(_text(left, top, label, 13, colours[stage.device]))
    return lines, len(ends)


def _memory(memory: DeviceMemory, top: float, colour: str) -> list[str]:
    width = WIDTH - 2 * MARGIN
    scale = width / max(memory.budget_bytes, memory.total_bytes, 1)
    text = f"{memory.device}: {format_bytes(memory.total_bytes)} of {format_bytes(memory.budget_bytes)}"
    lines = [
        _text(MARGIN, top + 14, text, 14, colour, 600),
        f'<rect x="{MARGIN}" y="{top + 22}" width="{width}" height="{BAR_HEIGHT}" fill="#f2f2f2" stroke="{colour}"/>',
    ]
    left = float(MARGIN)
    for (name, amount), (_, shade) in zip(memory.items(), ITEMS, strict=True):
        if amount:
            lines.append(
                f'<rect x="{left:.1f}" y="{top + 22}" width="{amount * scale:.1f}" height="{BAR_HEIGHT}" '
                f'fill="{shade}"><title>{name} {format_bytes(amount)}</title></rect>'
            )
            left += amount * scale
    return lines


def _legend(top: float) -> list[str]:
    lines, left = [], float(MARGIN)
    for name, shade in ITEMS:
        lines.append(f'<rect x="{left:.0f}" y="{top}" width="12" height="12" fill="{shade}"/>')
        lines.append(_text(left + 18, top + 11, name, 13, "#444444"))
        left += 34 + 8 * len(name)
    return lines


def _text(left: float, top: float, words: str, size: int, colour: str = "#111111", weight: int = 400) -> str:
    return (
        f'<text x="{max(left, MARGIN):.1f}" y="{top}" font-size="{size}" font-weight="{weight}" fill="{colour}">'
        f"{escape(words)}</text>"
    )
