"""A placement as a picture (SVG): the model's units from left to right, coloured by device, over a bar per device.

Reads the placement and its estimate; knows no machine and no browser.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from splitrun.errors import InvalidPlacement
from splitrun.planner.destination import write_whole
from splitrun.planner.estimate import DeviceMemory, Estimate
from splitrun.planner.placement import Placement
from splitrun.quantities import format_bytes, format_rate, format_seconds

WIDTH, MARGIN, TOP = 960, 32, 96
UNIT_HEIGHT, BAR_HEIGHT, ROW = 64, 22, 74
COLOURS = ("#3b6ea5", "#d9822b", "#4f9d69", "#a4508b", "#7a6c5d", "#c0504d", "#2a9d8f", "#6a5acd")
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
            f"the placement has no estimate to draw; plan again with: splitrun plan {placement.model.source} --svg FILE"
        )
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(placement.device_names)}
    height = TOP + UNIT_HEIGHT + 110 + ROW * len(stored.devices) + 40
    workload = placement.workload
    title = f"{placement.model.source}: {placement.layers} layers, {workload.sessions} × {workload.context:,} tokens"
    low, high = stored.decode_interval
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="14" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(MARGIN, 40, title, 20, weight=600),
        _text(
            MARGIN,
            66,
            f"{format_rate(stored.decode_tokens_per_s)} ({low:.3g}–{high:.3g}) decoding · first token of "
            f"{stored.prompt_tokens:,} after {format_seconds(stored.time_to_first_token_s)}",
            15,
            "#444444",
        ),
        *_units(placement, stored, colours),
    ]
    top = TOP + UNIT_HEIGHT + 90
    for memory in stored.devices:
        lines += _memory(memory, top, colours[memory.device])
        top += ROW
    lines += [*_legend(top + 6), "</svg>", ""]
    return "\n".join(lines)


def _units(placement: Placement, stored: Estimate, colours: dict[str, str]) -> list[str]:
    """One box per unit, a label under each stage and the hops between them."""
    count = placement.layers + 2
    step = (WIDTH - 2 * MARGIN) / count
    lines = []
    for row, (stage, figures) in enumerate(zip(placement.stages, stored.stages, strict=True)):
        colour = colours[stage.device]
        for unit in stage.units:
            left = MARGIN + unit * step
            lines.append(
                f'<rect x="{left:.1f}" y="{TOP}" width="{max(step - 1.5, 1):.1f}" height="{UNIT_HEIGHT}" rx="2" '
                f'fill="{colour}"/>'
            )
        left = MARGIN + stage.units.start * step
        top = TOP + UNIT_HEIGHT + 20 + 18 * (row % 3)
        label = f"{stage.device}: {stage.units_text} · {stage.weights} · {format_seconds(figures.decode_s)}"
        lines.append(_text(min(left, WIDTH - MARGIN - 7.2 * len(label)), top, label, 13, colour))
    return lines


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
