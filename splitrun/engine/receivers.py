"""Tokens to those who wait for them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from splitrun.schedule.request import TokenEvent

Deliver = Callable[[TokenEvent], None]
Deliveries = list[tuple[Deliver, TokenEvent]]

_LOG = logging.getLogger(__name__)


def hand_out(deliveries: Deliveries, give_up: Callable[[int], None]) -> None:
    """Tell the receivers, and forget them. One that raises loses its own request, which is given up, and nobody
    else's."""
    while deliveries:
        deliver, event = deliveries.pop(0)
        try:
            deliver(event)
        except Exception as error:  # the receivers' boundary: their faults are not the engine's
            _LOG.error("the receiver of request %d failed: %r", event.request_id, error)
            give_up(event.request_id)
