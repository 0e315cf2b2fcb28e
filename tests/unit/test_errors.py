"""The tree of errors: drawn as it is, with the exit status and HTTP status of each."""

from __future__ import annotations

import inspect

import pytest

from splitrun import errors

ALL = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.SplitrunError) and kind.__module__ == errors.__name__
}
STATUSES = {
    "SplitrunError": (1, 500),
    "PlacementError": (2, 500),
    "InvalidPlacement": (2, 500),
    "DoesNotFit": (2, 500),
    "ModelError": (2, 500),
    "UnsupportedModel": (2, 500),
    "MissingWeights": (2, 500),
    "CorruptWeights": (2, 500),
    "StageError": (1, 503),
    "StageLost": (1, 503),
    "StageTimeout": (1, 503),
    "DeviceOutOfMemory": (1, 503),
    "RequestError": (2, 400),
    "ContextTooLong": (2, 400),
    "QueueFull": (2, 429),
    "InvalidRequest": (2, 400),
    "ClusterError": (1, 503),
}


def test_the_statuses() -> None:
    assert {name: (kind.exit_status, kind.http_status) for name, kind in ALL.items()} == STATUSES


@pytest.mark.parametrize("name", sorted(set(STATUSES) - {"SplitrunError"}))
def test_the_docstring_draws_each_error_below_its_parent(name: str) -> None:
    lines = (errors.__doc__ or "").splitlines()
    places = [index for index, line in enumerate(lines) if f"── {name}" in line]
    assert len(places) == 1
    (place,) = places
    depth = lines[place].index("──")
    above = [line for line in lines[:place] if line.strip() and ("──" not in line or line.index("──") < depth)]
    parent = ALL[name].__bases__[0].__name__
    assert above[-1].replace("├──", "").replace("└──", "").split()[0] == parent


def test_does_not_fit_carries_its_own_copy_of_the_shortfall() -> None:
    missing = {"cpu": 5}
    error = errors.DoesNotFit("too big", missing)
    missing["cpu"] = 6
    assert (str(error), error.shortfall_bytes) == ("too big", {"cpu": 5})
    assert errors.DoesNotFit("too big").shortfall_bytes == {}
