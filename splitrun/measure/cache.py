"""Measurements kept between runs, so that planning is quick and the same twice on the same machine.

One JSON file in the cache folder. A key names what was measured and every condition that it holds under (device,
driver, torch, threads). Losing the file costs a measurement, never correctness: what cannot be read or written is
measured again. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from splitrun.folders import cache_folder as cache_folder

Figures = Mapping[str, float]


class Cache:
    """Key -> figures. ``refresh`` measures everything again, and keeps the new figures."""

    def __init__(self, folder: Path, refresh: bool = False) -> None:
        self._path = folder / "measurements.json"
        self._refresh = refresh
        self._entries = _read(self._path)

    @property
    def refresh(self) -> bool:
        """Whether what is kept is to be measured again."""
        return self._refresh

    def get(self, key: str) -> Figures | None:
        """What is kept under ``key``, whatever ``refresh`` says; None when there is nothing."""
        return self._entries.get(key)

    def get_or_measure(self, key: str, names: tuple[str, ...], measure: Callable[[], Figures]) -> Figures:
        """The kept figures when they have all of ``names``, else what ``measure`` returns, which is then kept."""
        kept = self._entries.get(key)
        if kept is not None and not self._refresh and all(name in kept for name in names):
            return kept
        figures = measure()
        self.put(key, figures)
        return figures

    def put(self, key: str, figures: Figures) -> None:
        """Keep figures under ``key``."""
        self._entries = {**self._entries, **_read(self._path), key: dict(figures)}
        text = json.dumps(self._entries, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError:
            return  # a full disk or a read-only home: the next run measures again


def _read(path: Path) -> dict[str, Figures]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: entry for key, entry in content.items() if isinstance(key, str) and _is_figures(entry)}


def _is_figures(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(name, str) and isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        for name, value in entry.items()
    )
