"""Facts as a file: a model's profile, a cluster and what was measured, as versioned JSON.

Written on one machine and read on another, so that one can plan for hardware that is not here. Every fault names the
file and the entry. Knows the dataclasses of ``facts.py`` by their annotations alone.
"""

from __future__ import annotations

import collections.abc
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from splitrun.errors import InvalidPlacement
from splitrun.planner.destination import write_whole
from splitrun.planner.facts import FORMATS, Cluster, ModelProfile
from splitrun.quantities import MAX_BYTES

VERSION = 2
MAX_FILE_BYTES = 64 << 20
MAX_RATE = 10**24
"""No device computes or reads more in a second."""
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Facts:
    """What a plan is made from. ``made_by`` is the version of splitrun that measured."""

    profile: ModelProfile
    cluster: Cluster
    made_by: str = ""


def write_facts(facts: Facts, file: Path) -> None:
    """Save the facts. Raises InvalidPlacement when the file cannot be written."""
    content = {"version": VERSION, **plain(facts)}
    write_whole(file, json.dumps(content, indent=1) + "\n", "--facts")


def read_facts(file: Path) -> Facts:
    """The facts in that file. Raises InvalidPlacement naming the file, the entry and what mends it."""
    again = f"make it again with: splitrun profile MODEL --facts {file}"
    try:
        if file.exists() and not file.is_file():
            raise InvalidPlacement(f"{file}: cannot be read: it is not a regular file; {again}")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidPlacement(f"{file}: larger than 64 MiB, so not a facts file; {again}")
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InvalidPlacement(f"{file}: no such file; make one with: splitrun profile MODEL --facts {file}") from error
    except OSError as error:
        raise InvalidPlacement(f"{file}: cannot be read: {error.strerror or error}; {again}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidPlacement(f"{file}: not JSON: {' '.join(str(error).split())[:120]}; {again}") from error
    if not isinstance(content, dict) or "version" not in content:
        raise InvalidPlacement(f"{file}: not a facts file: it has no version; {again}")
    if content["version"] != VERSION:
        shown = str(content["version"])[:20]
        raise InvalidPlacement(f"{file}: version {shown} is not this splitrun's version {VERSION}; {again}")
    try:
        made: Facts = build(Facts, {name: value for name, value in content.items() if name != "version"}, "")
        _check(made)
        return made
    except ValueError as error:
        raise InvalidPlacement(f"{file}: {error}; {again}") from error


def plain(value: Any) -> Any:
    """The value as mappings, lists, text and numbers; a mapping with pairs as keys becomes a list of entries."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        if any(isinstance(key, tuple) for key in value):
            return [[*key, plain(item)] for key, item in value.items()]
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def build(kind: Any, data: Any, where: str) -> Any:
    """The dataclass ``kind`` from what ``plain`` made of one. Raises ValueError naming the entry at fault."""
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the file'} must be a mapping")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    for name in data:
        if name not in known:
            raise ValueError(f"{_inside(where, str(name)[:60])} is unknown")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_inside(where, name)} is missing")
    return kind(**{name: _value(hints[name], value, _inside(where, name)) for name, value in data.items()})


def _check(facts: Facts) -> None:
    """Raise ValueError where entries contradict each other, as they may in a file that was edited."""
    profile, devices = facts.profile, facts.cluster.devices
    units, groups = profile.units, {group.name for group in profile.groups}
    names = [device.name for device in devices]
    known = set.intersection(*(set(unit.weight_bytes) for unit in units)) if units else set()
    counts = {len(found.units) for found in profile.seconds.values()} | set(map(len, profile.peaks.values()))
    faults = {
        "cluster.devices must name at least one device": not devices,
        "cluster.devices names a device twice": len(set(names)) < len(names),
        "cluster.devices: speeds must be more than 0": not all(
            device.bandwidth_bytes_per_s and device.flops_per_s for device in devices
        ),
        "profile.units must be embed, layers and head": len(units) < 3,
        f"profile.stored_format must be one of {', '.join(FORMATS)}": profile.stored_format not in FORMATS,
        "profile.units must have bytes in a format that is known": not known & set(FORMATS),
        "profile.seconds and profile.peaks must have an entry for every unit": bool(counts - {len(units)}),
        "profile.units keep KV in a group that profile.groups lacks": any(
            set(unit.kv_values_per_token) - groups for unit in units
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(fault)


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return build(hint, data, where)
    if origin in (Union, UnionType):
        if data is None and NoneType in arguments:
            return None
        return _value(next(kind for kind in arguments if kind is not NoneType), data, where)
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}")
        return data
    if origin is tuple:
        return _tuple(arguments, data, where)
    if origin is collections.abc.Mapping:
        return _mapping(arguments, data, where)
    return _scalar(hint, data, where)


def _tuple(arguments: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ValueError(f"{where} must be a list")
    kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(data):
        raise ValueError(f"{where} must have {len(kinds)} entries")
    return tuple(
        _value(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _mapping(arguments: tuple[Any, ...], data: Any, where: str) -> dict[Any, Any]:
    key_kind, value_kind = arguments
    if isinstance(data, dict):
        return {str(key): _value(value_kind, item, f"{where}.{str(key)[:60]}") for key, item in data.items()}
    count = len(get_args(key_kind))
    if not isinstance(data, list) or not all(isinstance(entry, list) and len(entry) == count + 1 for entry in data):
        raise ValueError(f"{where} must be a mapping")
    if not all(isinstance(part, str) for entry in data for part in entry[:-1]):
        raise ValueError(f"{where} must name its entries with text")
    return {tuple(entry[:-1]): _value(value_kind, entry[-1], f"{where}[{entry[0]}]") for entry in data}


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if type(data) is int and abs(data) > (MAX_BYTES if hint is int else MAX_RATE):
        raise ValueError(f"{where} is larger than any size or count")
    if hint is float and type(data) is int:
        data = float(data)
    if type(data) is not hint:
        raise ValueError(f"{where} must be {_WORDS.get(hint, 'a value')}")
    if isinstance(data, int | float) and not 0 <= data < math.inf:
        raise ValueError(f"{where} must be finite and not negative")
    return data


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
