"""Where a command may write what it made: a regular file, or a new one in a folder that is there.

Replaces the file whole or leaves it as it was. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from splitrun.errors import InvalidPlacement


def check_destination(file: Path, option: str = "-o") -> None:
    """Raise InvalidPlacement when ``file`` is a device, a pipe or a folder, or lies in a folder that is not there."""
    try:
        if file.exists() and not file.is_file():
            what = "a folder" if file.is_dir() else "not a regular file"
            raise InvalidPlacement(f"{file}: cannot be written: it is {what}; name another file with {option} FILE")
        parent = Path(os.path.realpath(file)).parent
        if not parent.is_dir():
            raise InvalidPlacement(
                f"{file}: cannot be written: there is no folder {parent}; make it, or name another file "
                f"with {option} FILE"
            )
    except (OSError, ValueError) as fault:
        raise _unwritable(file, fault, option) from fault


def write_whole(file: Path, text: str, option: str = "-o") -> None:
    """Make ``text`` the file's content, whole or not at all. Raises InvalidPlacement with the file and the reason."""
    check_destination(file, option)
    place = Path(os.path.realpath(file))
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(place)
    except (OSError, ValueError) as fault:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        raise _unwritable(file, fault, option) from fault


def _unwritable(file: Path, fault: OSError | ValueError, option: str) -> InvalidPlacement:
    why = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
    return InvalidPlacement(f"{file}: cannot be written: {why}; name another file with {option} FILE")
