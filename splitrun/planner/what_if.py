"""Change a cluster on paper: other budgets, further devices and nodes, devices taken away. Pure; measures nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from splitrun.errors import InvalidPlacement
from splitrun.planner.datasheet import CARD_PROCESS_BYTES, Sheet, find_device, find_link
from splitrun.planner.facts import Cluster, Device, Link
from splitrun.quantities import format_bytes, parse_budget

HOST_POOL = "host"


@dataclass(frozen=True)
class Changes:
    """What to change, as the command line names it."""

    add: Sequence[str] = ()
    add_node: Sequence[str] = ()
    drop: Sequence[str] = ()
    link: str = "1GbE"


def changed(cluster: Cluster, changes: Changes) -> tuple[Cluster, list[str]]:
    """The cluster after the changes, and what to know about the devices added. Raises InvalidPlacement."""
    network = find_link(changes.link)
    both = set(changes.add) & set(changes.drop)
    if both:
        raise InvalidPlacement(f"{sorted(both)[0]!r} is both added and dropped; name it once")
    devices = list(cluster.devices)
    for name in changes.drop:
        devices.remove(_named(devices, name, "--drop: there is no"))
    links = {pair: link for pair, link in cluster.links.items() if all(_has(devices, end) for end in pair)}
    notes: list[str] = []
    process_bytes = cluster.card_process_bytes
    for text in changes.add:
        sheet = find_device(text, "--add", ["gpus"])
        if sheet.kind == "cpu":
            raise InvalidPlacement(f"--add {text!r} is a processor: name it with --machine or --add-node")
        device = sheet.device(_free_name(devices, sheet.kind, ""), HOST_POOL)
        links |= _links(sheet, device, [other for other in devices if "/" not in other.name])
        devices.append(device)
        notes += [f"{device.name}: {sheet.note}"] if sheet.note else []
        if device.kind == "cuda" and process_bytes == 0:
            process_bytes = CARD_PROCESS_BYTES
            notes.append(
                f"{device.name}: a card in use takes main memory too; its {format_bytes(process_bytes)} were measured "
                "beside another card"
            )
    for number, text in enumerate(changes.add_node, start=1):
        sheet = find_device(text, "--add-node")
        node = f"node{number}"
        device = sheet.device(_free_name(devices, sheet.kind, f"{node}/"), node)
        links |= {pair: network for other in devices for pair in _pairs(other.name, device.name)}
        links |= dict.fromkeys(_pairs("cpu", device.name), network)
        devices.append(device)
        notes += [f"{device.name}: {sheet.note}"] if sheet.note else []
    if not devices:
        raise InvalidPlacement("no device is left; drop fewer, or add one")
    return replace(cluster, devices=tuple(devices), links=links, card_process_bytes=process_bytes), notes


def machine_of(name: str) -> Cluster:
    """A machine with that processor alone."""
    sheet = find_device(name, "--machine", ["cpus"])
    if sheet.kind != "cpu":
        raise InvalidPlacement(f"--machine {name!r} is no processor: name one, and the card with --add")
    return Cluster((sheet.device("cpu", HOST_POOL),))


def started(
    here: Sequence[str], memory: Mapping[str, str | int] | None, drop: Sequence[str]
) -> tuple[dict[str, str | int], dict[str, str | int]]:
    """The devices to start from with their budgets, and the budgets of others, which changes may add.

    ``here`` are the names of the devices that are there, ``drop`` those to do without: a budget under such a name is
    another device's, which takes it. Raises InvalidPlacement.
    """
    for name in drop:
        _refuse_unknown(here, name, "--drop: there is no")
    asked: Mapping[str, str | int] = dict.fromkeys(here, "auto") if memory is None else memory
    start = {name: size for name, size in asked.items() if name in here and name not in drop}
    later = {name: size for name, size in asked.items() if memory is not None and name not in start}
    return start, later


def with_budgets(cluster: Cluster, memory: Mapping[str, str | int], where: str) -> Cluster:
    """The devices that ``memory`` names, each with that budget ("auto": its own), in that order. Raises
    InvalidPlacement."""
    devices = [
        _budgeted(_named(cluster.devices, name, f"--memory: {where} has no"), size) for name, size in memory.items()
    ]
    return replace(cluster, devices=tuple(devices))


def _budgeted(device: Device, size: str | int) -> Device:
    if size == "auto":
        return device
    try:
        budget = parse_budget(size)
    except ValueError as error:
        raise InvalidPlacement(f"budget of {device.name}: {error}") from error
    if budget == 0:
        raise InvalidPlacement(f"a budget of 0 for {device.name}: leave the device out to keep it unused")
    if budget > device.total_bytes:
        total = format_bytes(device.total_bytes)
        raise InvalidPlacement(f"{device.name} has {total} of memory, not {size}; lower its budget in --memory")
    return replace(device, budget_bytes=budget)


def _named(devices: Sequence[Device], name: str, what: str) -> Device:
    _refuse_unknown([device.name for device in devices], name, what)
    return next(device for device in devices if device.name == name)


def _refuse_unknown(names: Sequence[str], name: str, what: str) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {' and '.join(names) or 'none'}"
    raise InvalidPlacement(f"{what} {name[:60]!r}: {hint}")


def _has(devices: Sequence[Device], name: str) -> bool:
    return name == "cpu" or any(device.name == name for device in devices)


def _free_name(devices: Sequence[Device], kind: str, prefix: str) -> str:
    if kind == "cpu":
        return f"{prefix}cpu"
    number = 0
    while any(device.name == f"{prefix}{kind}:{number}" for device in devices):
        number += 1
    return f"{prefix}{kind}:{number}"


def _links(sheet: Sheet, device: Device, others: Sequence[Device]) -> dict[tuple[str, str], Link]:
    """Between a card and the devices of its machine: its own link, twice as long from card to card."""
    own = find_link(sheet.link)
    through_host = Link(2 * own.latency_s, own.bandwidth_bytes_per_s / 2)
    names = {other.name: own if other.kind == "cpu" else through_host for other in others} | {"cpu": own}
    return {pair: link for name, link in names.items() for pair in _pairs(name, device.name)}


def _pairs(one: str, other: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (one, other), (other, one)
