"""While a graph is recorded no garbage is looked for, whatever happens there."""

from __future__ import annotations

import gc

import pytest

from splitrun.stage.recording import recording


def test_the_collector_rests_and_goes_on() -> None:
    with recording():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), recording():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_a_collector_that_rested_before_rests_on() -> None:
    gc.disable()
    try:
        with recording():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
