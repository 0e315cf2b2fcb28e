"""Where this machine keeps what it knows of its node: the token, and a record of the running node process.

The folder is ``$SPLITRUN_HOME``, else ``$XDG_STATE_HOME/splitrun``, else ``~/.local/state/splitrun``; only its owner
may enter. Knows nothing of Ray.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from splitrun.errors import ClusterError

TOKEN = re.compile(r"[A-Za-z0-9]{32,128}")


@dataclass(frozen=True)
class NodeRecord:
    """The node of this machine. ``head`` is the first machine's address and port; ``process`` ends with the node."""

    name: str
    host: str
    port: int
    head: str
    process: int

    @property
    def is_head(self) -> bool:
        """Whether this is the first machine."""
        return self.head == f"{self.host}:{self.port}"


class Home:
    """The folder. Raises ClusterError when it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token_file = folder / "token"
        self.log_file = folder / "node.log"
        self._record_file = folder / "node.json"

    @classmethod
    def default(cls, environment: Mapping[str, str] = os.environ) -> Home:
        """The folder of this user."""
        if environment.get("SPLITRUN_HOME"):
            return cls(Path(environment["SPLITRUN_HOME"]))
        state = environment.get("XDG_STATE_HOME")
        return cls(Path(state, "splitrun") if state else Path.home() / ".local" / "state" / "splitrun")

    def token(self) -> str:
        """The stored token, made now when there is none."""
        try:
            kept = self.token_file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            kept = secrets.token_hex(24)
            self.keep_token(kept)
        except (OSError, ValueError) as error:
            raise ClusterError(f"{self.token_file} cannot be read: {error}; remove it to get a new token") from error
        if not TOKEN.fullmatch(kept):
            raise ClusterError(f"{self.token_file} holds no token; remove it to get a new one")
        return kept

    def keep_token(self, token: str) -> None:
        """Store a token so that only this user can read it."""
        if not TOKEN.fullmatch(token):
            raise ClusterError("that is no token: copy the whole command that 'splitrun node start' printed")
        self._write(self.token_file, token + "\n")

    def record(self) -> NodeRecord | None:
        """The node that was started here last; None when there is none. It may have ended meanwhile."""
        try:
            return NodeRecord(**json.loads(self._record_file.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"{self._record_file} cannot be read: {error}; remove it") from error

    def keep_record(self, record: NodeRecord) -> None:
        """Remember the running node."""
        self._write(self._record_file, json.dumps(dataclasses.asdict(record)) + "\n")

    def forget_record(self) -> None:
        """The node has ended."""
        self._record_file.unlink(missing_ok=True)

    def _write(self, file: Path, text: str) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            fresh = file.with_name(file.name + ".new")
            fresh.unlink(missing_ok=True)
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
                out.write(text)
            fresh.replace(file)
        except OSError as error:
            raise ClusterError(f"{file} cannot be written: {error.strerror}; set SPLITRUN_HOME") from error
