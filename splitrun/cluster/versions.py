"""What machines must have in common, compared when one joins. Knows nothing of how the versions travel."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

from splitrun.transport.frames import VERSION as WIRE_VERSION

Versions = Mapping[str, str]


def own_versions() -> dict[str, str]:
    """Name -> version of what runs here. Python counts to its minor version, torch without its build."""
    major, minor, _ = platform.python_version_tuple()
    return {
        "Python": f"{major}.{minor}",
        "Ray": metadata.version("ray"),
        "torch": metadata.version("torch").partition("+")[0],
        "transformers": metadata.version("transformers"),
        "splitrun's wire protocol": str(WIRE_VERSION),
    }


def differences(here: Versions, there: Versions) -> list[str]:
    """What does not agree, in words: "Python 3.11 here, 3.12 there"."""
    names = [*here, *(name for name in there if name not in here)]
    return [
        f"{name} {here.get(name, 'missing')} here, {there.get(name, 'missing')} there"
        for name in names
        if here.get(name) != there.get(name)
    ]
