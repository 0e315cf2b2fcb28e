"""Entry of the process that measures a node: its devices, and a model's units on them, by the code that measures here.

Speaks lines of JSON with its keeper, as a stage process does. Knows nothing of plans.
"""

from __future__ import annotations

import threading
from typing import Any

from splitrun.cluster.lines import Parent, beat_until, open_parent


def serve(parent: Parent, job: dict[str, Any]) -> None:
    """Measure, tell, end."""
    done = threading.Event()
    beat_until(done, 0.5, lambda: parent.say(alive=True))
    from splitrun.cluster.model_there import locate
    from splitrun.errors import SplitrunError
    from splitrun.measure.gather import gather
    from splitrun.planner.facts import Cluster, ModelProfile
    from splitrun.planner.facts_file import plain
    from splitrun.planner.formats import device_formats

    def formats(profile: ModelProfile, cluster: Cluster) -> dict[str, tuple[str, ...]]:
        return dict(device_formats(profile, cluster, str(job["formats"])))

    try:
        files = locate(job["model"], parent, str(job["node"]))
        facts = gather(
            str(files.path),
            None,
            "weights" if files.weights else "dummy",
            job["memory"],
            formats,
            tuple(job["rows"]),
            refresh=bool(job["refresh"]),
            kv=str(job["kv"]),
            report=lambda text: parent.say(report=text),
        )
        parent.say(facts=plain(facts))
    except SplitrunError as error:
        parent.say(error=[type(error).__name__, str(error)])


if __name__ == "__main__":
    open_parent(serve)
