"""Every error that splitrun raises on purpose, in one tree.

    SplitrunError
    ├── PlacementError
    │   ├── InvalidPlacement     the file or object contradicts itself, the model or this machine
    │   └── DoesNotFit           a budget is too small; carries the shortfall per device
    ├── ModelError
    │   ├── UnsupportedModel     the architecture cannot be cut exactly, or needs code we do not run
    │   ├── MissingWeights       tensors or files are absent, unexpected or of another shape
    │   └── CorruptWeights       a shard is truncated, not safetensors, or holds NaN
    ├── StageError
    │   ├── StageLost            the worker of a stage died or raised
    │   ├── StageTimeout         a stage did not answer in time
    │   └── DeviceOutOfMemory    a device ran out of memory while running
    ├── RequestError
    │   ├── ContextTooLong       prompt and new tokens exceed the planned context
    │   ├── QueueFull            too many requests are waiting
    │   └── InvalidRequest       a parameter is out of range or of the wrong type
    └── ClusterError             nodes cannot be reached or disagree

A message is one line: what happened, where, and the command or setting that mends it. Errors of other libraries are
translated into these at the border where they arise. This module knows nothing of how errors are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class SplitrunError(Exception):
    """Base of the tree. ``exit_status`` is the command line's, ``http_status`` the server's."""

    exit_status: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class PlacementError(SplitrunError):
    """The placement is at fault, not the model or the run."""

    exit_status = 2


class InvalidPlacement(PlacementError):
    """The placement contradicts itself, the model or this machine."""


class DoesNotFit(PlacementError):
    """A budget is too small.

    ``shortfall_bytes`` maps a device name to the bytes missing there (0 where it fits).
    """

    def __init__(self, message: str, shortfall_bytes: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.shortfall_bytes: dict[str, int] = dict(shortfall_bytes or {})


class ModelError(SplitrunError):
    """The model is at fault."""

    exit_status = 2


class UnsupportedModel(ModelError):
    """The architecture cannot be cut exactly, or needs code that splitrun does not run."""


class MissingWeights(ModelError):
    """Tensors or files are absent, unexpected or of another shape."""


class CorruptWeights(ModelError):
    """A shard is truncated, is not safetensors, or holds NaN."""


class StageError(SplitrunError):
    """A stage failed while loading or running."""

    http_status = 503


class StageLost(StageError):
    """The worker of a stage died or raised."""


class StageTimeout(StageError):
    """A stage did not answer in time."""


class DeviceOutOfMemory(StageError):
    """A device ran out of memory while running."""


class RequestError(SplitrunError):
    """The request is at fault; others are untouched."""

    exit_status = 2
    http_status = 400


class ContextTooLong(RequestError):
    """Prompt and new tokens exceed the planned context."""


class QueueFull(RequestError):
    """Too many requests are waiting."""

    http_status = 429


class InvalidRequest(RequestError):
    """A parameter is out of range or of the wrong type."""


class ClusterError(SplitrunError):
    """Nodes cannot be reached or disagree."""

    http_status = 503
