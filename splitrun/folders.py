"""Where splitrun keeps what saves time the next time: measurements, proofs, packed weights.

``$SPLITRUN_CACHE``, else ``$XDG_CACHE_HOME/splitrun``, else ``~/.cache/splitrun``. Losing any of it costs time, never
correctness. Knows nothing of what is kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder; it need not exist yet."""
    if environment.get("SPLITRUN_CACHE"):
        return Path(environment["SPLITRUN_CACHE"])
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"], "splitrun")
    return Path.home() / ".cache" / "splitrun"
