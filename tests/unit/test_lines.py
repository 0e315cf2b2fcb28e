"""A stage's process whose parent no longer reads what it says."""

from __future__ import annotations

import subprocess
import sys

SAYING = """
import threading
from splitrun.cluster.lines import Parent, beat_until, open_parent

def serve(parent: Parent, job: dict) -> None:
    done = threading.Event()
    beat_until(done, 0.05, lambda: parent.say(alive=True))
    done.wait(60)

open_parent(serve)
"""


def test_a_process_that_nobody_hears_ends_without_a_word() -> None:
    command = [sys.executable, "-c", SAYING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        assert process.stdout.readline() == b'{"alive": true}\n'
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""
