"""What must rest while a graph of a card is recorded. Knows no card."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RECORDING = threading.Lock()
"""torch records one graph of a process at a time."""


@contextmanager
def recording() -> Iterator[None]:
    """While open, no garbage is looked for: graphs of a stage that is gone lie in circles, and one that is freed while
    another is recorded spoils it."""
    with RECORDING:
        looked = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if looked:
                gc.enable()
