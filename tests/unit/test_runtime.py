"""What Ray is told before it is loaded, and what it still believes afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import splitrun

RESOLVED = """
import sys
from pathlib import Path
from splitrun.cluster.runtime import set_environment
for host in sys.argv[1:]:
    set_environment(Path("token"), host)
    from ray._private.services import resolve_ip_for_localhost
print(resolve_ip_for_localhost("127.0.0.1"))
"""


@pytest.mark.parametrize("hosts", [("10.203.9.1", "127.0.0.1"), ("127.0.0.1", "10.203.9.1", "127.0.0.1")])
def test_a_process_goes_from_one_kind_of_cluster_to_another(hosts: tuple[str, ...]) -> None:
    """On the loopback Ray must look for the head there, though it was loaded for a cluster of several machines.
    In a process of its own: Ray reads what it is told once in the life of one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(splitrun.__file__).parent.parent)}
    command = [sys.executable, "-c", RESOLVED, *hosts]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert outcome.stdout == "127.0.0.1\n", outcome.stderr
