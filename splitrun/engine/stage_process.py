"""Entry of a stage process: the pipes to its parent. What it computes is in ``stage_host``.

Told by lines of JSON on standard input: first the job, then who the peers are, each time that changes. Answers on
standard output with ``address``, ``loaded`` and ``connected``, or ``error``; until it is connected it repeats
``alive``.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from splitrun.cluster.lines import Parent, beat_until, open_parent


def serve(parent: Parent, job: dict[str, Any]) -> None:
    """Load the job's stages and run them until the parent is gone."""
    connected = threading.Event()
    beat_s = float(job["beat_s"])
    beat_until(connected, beat_s, lambda: parent.say(alive=True))
    from splitrun.model.lean_import import import_transformers

    import_transformers()
    from splitrun.engine.record import log_json
    from splitrun.engine.stage_host import StageHost  # here, because this import alone takes seconds
    from splitrun.errors import SplitrunError

    if job.get("log") == "json":
        log_json(str(job["device"]))
    try:
        host = StageHost(job, parent)
        parent.say(address=host.address)
        parent.say(loaded=host.load())
    except SplitrunError as error:
        parent.say(error=[type(error).__name__, str(error)])
        sys.exit(error.exit_status)
    while True:
        host.connect(parent.told.get()["peers"])
        if not connected.is_set():
            connected.set()
            beat_until(threading.Event(), beat_s, host.beat)
        parent.say(connected=True)


if __name__ == "__main__":
    open_parent(serve)
