"""Entry of the process at the far end of a measured link: answers every frame with a small one; measures when told.

Speaks lines of JSON with its keeper, as a stage process does.
"""

from __future__ import annotations

import queue
from typing import Any

from splitrun.cluster.lines import Parent, open_parent
from splitrun.cluster.links import measure_link
from splitrun.errors import ClusterError
from splitrun.transport.frames import Frame, Kind
from splitrun.transport.mailbox import Address
from splitrun.transport.socket import SocketMailbox


def serve(parent: Parent, job: dict[str, Any]) -> None:
    """Answer until the parent is gone."""
    session, own = int(job["session"]), str(job["own"])
    arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    names: list[str] = []

    def receive(frame: Frame) -> None:
        if frame.kind is Kind.STEP:
            mailbox.send(str(frame.control.get("from", "")), Frame(Kind.BEAT, session, step=frame.step))
        else:
            arrived.put(frame)

    try:
        mailbox = SocketMailbox(session, receive, str(job["host"]), tuple(job["ports"]))
    except ClusterError as error:
        parent.say(error=[type(error).__name__, str(error)])
        return
    parent.say(address=[mailbox.address.endpoint, mailbox.address.public_key])
    while True:
        told = parent.told.get()
        if "peers" in told:
            names = [name for name in told["peers"] if name != own]
            for name in names:
                mailbox.connect(name, Address(*told["peers"][name]))
            parent.say(connected=True)
        elif told.get("measure") in names:
            try:
                link = measure_link(mailbox, told["measure"], session, arrived, own)
                parent.say(link=[link.latency_s, link.bandwidth_bytes_per_s])
            except ClusterError as error:
                parent.say(error=[type(error).__name__, str(error)])


if __name__ == "__main__":
    open_parent(serve)
