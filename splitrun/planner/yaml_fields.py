"""Strict reading of a small YAML file written by people: every fault names file, line and key.

Refused outright: anchors, aliases and tags (bombs and object construction need them), more than one document, deep
nesting, too many entries, bytes that are not UTF-8. Values are read by the type that the caller expects, not by
YAML's guesses. Knows nothing of placements.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from splitrun.errors import InvalidPlacement
from splitrun.quantities import parse_bytes

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 12
MAX_EVENTS = 50_000
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})", re.ASCII)
_REAL = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{1,30})?(?:[eE][-+]?[0-9]{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Field:
    """One value in the file, and the key that leads to it ("stages[1].layers")."""

    file: Path
    key: str
    node: yaml.Node

    def fail(self, why: str) -> NoReturn:
        """Raise InvalidPlacement at this value's line."""
        raise InvalidPlacement(
            _located(self.file, self.node.start_mark.line + 1, f"{self.key}: {why}" if self.key else why)
        )

    def is_null(self) -> bool:
        """Whether the value is null (or left empty)."""
        return isinstance(self.node, yaml.ScalarNode) and self.node.tag == "tag:yaml.org,2002:null"

    def is_mapping(self) -> bool:
        """Whether the value is a mapping."""
        return isinstance(self.node, yaml.MappingNode)

    def text(self) -> str:
        """A string that is not empty; a quoted one may look like anything else."""
        node = self._scalar("text")
        if node.style is None and node.tag != "tag:yaml.org,2002:str":
            self.fail(f"{_shown(node)} must be text; put quotes around it if it is")
        if not node.value.strip():
            self.fail("must not be empty")
        if not node.value.isprintable():
            self.fail(f"{node.value[:40]!r} holds characters that cannot be printed")
        return str(node.value)

    def choice(self, allowed: Sequence[str]) -> str:
        """One of the words allowed."""
        word = self.text()
        if word not in allowed:
            self.fail(f"{word[:80]!r} is unknown{_nearest(word, allowed)}; allowed: {', '.join(allowed)}")
        return word

    def integer(self, least: int, most: int) -> int:
        """A whole number, least <= number <= most, in plain decimal digits."""
        node = self._scalar("a whole number")
        if node.style is not None or not _INTEGER.fullmatch(node.value):
            self.fail(f"{_shown(node)} is not a whole number")
        value = int(node.value)
        if not least <= value <= most:
            self.fail(f"{value} is out of range; allowed: {least} to {most}")
        return value

    def size(self, parse: Callable[[str | int], int] = parse_bytes) -> int:
        """Bytes, from 4GiB, 350MB or a plain count."""
        node = self._scalar("a size")
        plain = node.style is None and _INTEGER.fullmatch(node.value)
        if node.tag == "tag:yaml.org,2002:float":
            self.fail(f"{_shown(node)} is not a size; write it like 4GiB or 350MB")
        try:
            return parse(int(node.value) if plain else str(node.value))
        except ValueError as fault:
            self.fail(str(fault))

    def entries(self) -> list[Field]:
        """The items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.fail(f"must be a list, not {_shown(self.node)}")
        return [Field(self.file, f"{self.key}[{index}]", node) for index, node in enumerate(self.node.value)]

    def members(self, allowed: Sequence[str] | None, required: Iterable[str] = ()) -> dict[str, Field]:
        """The values of a mapping by key; unknown (unless ``allowed`` is None), duplicate and missing keys fail."""
        if not isinstance(self.node, yaml.MappingNode):
            self.fail(f"must be a mapping, not {_shown(self.node)}")
        found: dict[str, Field] = {}
        for key_node, value_node in self.node.value:
            key_field = Field(self.file, self.key or "the file", key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                key_field.fail("a key must be a word")
            name = str(key_node.value)
            if allowed is not None and name not in allowed:
                nearest = _nearest(name, allowed)
                key_field.fail(f"unknown key {name[:80]!r}{nearest}; allowed: {', '.join(allowed)}")
            if name in found:
                first = found[name].node.start_mark.line + 1
                key_field.fail(f"key {name[:80]!r} is given twice, first on line {first}")
            found[name] = Field(self.file, f"{self.key}.{name}" if self.key else name, value_node)
        for name in required:
            if name not in found:
                Field(self.file, self.key or "the file", self.node).fail(f"key {name!r} is missing")
        return found

    def plain(self) -> object:
        """The value as mappings, lists, text and finite numbers, without any judgement."""
        node = self.node
        if isinstance(node, yaml.MappingNode):
            return {str(key.value): Field(self.file, self.key, value).plain() for key, value in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [Field(self.file, self.key, item).plain() for item in node.value]
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            if _INTEGER.fullmatch(node.value):
                return int(node.value)
            if _REAL.fullmatch(node.value):
                return float(node.value)
        return None if self.is_null() else str(node.value)

    def _scalar(self, wanted: str) -> yaml.ScalarNode:
        if not isinstance(self.node, yaml.ScalarNode) or self.is_null():
            self.fail(f"must be {wanted}, not {_shown(self.node)}")
        return self.node


def read_root(file: Path) -> Field:
    """The top of the only document in ``file``; raises InvalidPlacement for everything that is not plain YAML."""
    text = _read_text(file)
    try:
        _screen(file, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = mark.line + 1 if mark else 1
        why = " ".join(str(fault.problem or fault.context or "unreadable").split())
        raise InvalidPlacement(_located(file, line, f"not YAML: {why}")) from fault
    except (yaml.YAMLError, ValueError, OverflowError) as fault:
        # PyYAML lets ValueError out for escapes beyond Unicode and for absurd version numbers
        why = " ".join(str(fault).split())[:200]
        raise InvalidPlacement(f"{file}: not YAML: {why}") from fault
    if node is None:
        raise InvalidPlacement(f"{file}: the file is empty; make one with: splitrun plan MODEL -o {file}")
    return Field(file, "", node)


def _read_text(file: Path) -> str:
    try:
        # Looked at first: opening a pipe would wait for whoever writes into it.
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InvalidPlacement(f"{file}: cannot be read: it is not a regular file; name a placement file")
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as fault:
        raise InvalidPlacement(f"{file}: no such file; make one with: splitrun plan MODEL -o {file}") from fault
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
        raise InvalidPlacement(f"{file}: cannot be read: {why}; name a readable placement file") from fault
    if len(content) > MAX_FILE_BYTES:
        raise InvalidPlacement(f"{file}: larger than 1 MiB, so not a placement; make one with: splitrun plan MODEL")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        raise InvalidPlacement(_located(file, line, f"not UTF-8 text: {fault.reason}; save it as UTF-8")) from fault


def _screen(file: Path, text: str) -> None:
    """Refuse what a placement never needs, event by event, before any tree is built."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        why, tag = None, getattr(event, "tag", None)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            why = "a second document; keep one placement per file" if documents > 1 else None
        elif isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            why = "anchors and aliases (& and *) are not allowed; write the value out"
        elif tag is not None:
            why = f"the tag {str(tag)[:80]!r} is not allowed; write a plain value"
        elif count > MAX_EVENTS:
            why = "far too many entries for a placement"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            why = f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else why
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if why:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise InvalidPlacement(_located(file, line, why))


def _located(file: Path, line: int, why: str) -> str:
    return f"{file}:{line}: {why}"


def _nearest(word: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(word[:80], list(allowed), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value[:80]) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
