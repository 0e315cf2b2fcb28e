"""Where a benchmark may write, said before its long run: types for the options of argparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from splitrun.errors import InvalidPlacement
from splitrun.planner.destination import check_destination


def file(text: str) -> Path:
    """A file that can be written; raises ArgumentTypeError for a folder, or in a folder that is not there."""
    path = Path(text)
    try:
        check_destination(path)
    except InvalidPlacement as fault:
        raise argparse.ArgumentTypeError(str(fault)) from fault
    return path


def folder(text: str) -> Path:
    """A folder, which is made when it is not there; raises ArgumentTypeError where that cannot be."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise argparse.ArgumentTypeError(f"{text} can be no folder: {fault.strerror}; name another") from fault
    return path
