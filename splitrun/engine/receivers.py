"""Tokens to those who wait for them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from splitrun.schedule.request import TokenEvent

Deliver = Callable[[TokenEvent], None]
Deliveries = deque[tuple[Deliver, TokenEvent]]
"""What is to be told to whom, the oldest first."""

_LOG = logging.getLogger(__name__)


def hand_over(deliver: Deliver, event: TokenEvent, give_up: Callable[[int], None]) -> None:
    """Tell a receiver. One that raises loses its own request, which is given up, and nobody else's."""
    try:
        deliver(event)
    except Exception as error:  # the receivers' boundary: their faults are not the engine's
        _LOG.error("the receiver of request %d failed: %r", event.request_id, error)
        give_up(event.request_id)
