"""A Hugging Face Hub of one or two models on 127.0.0.1, enough for huggingface_hub's own client."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType

COMMIT = "a" * 40


class FakeHub:
    """Serves ``directory/OWNER/MODEL``; "gated/…" answers as a gated repository does. ``requests``: what was got."""

    def __init__(self, directory: Path) -> None:
        hub = self
        self.requests: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0].strip("/")
                if body:
                    hub.requests.append(path)
                parts = path.split("/")
                if parts[0] == "api":
                    repository = directory / parts[2] / parts[3]
                    if "tree" in parts:
                        self.reply(tree(repository), body)
                    else:
                        self.reply(description(repository, "/".join(parts[2:4])), body)
                    return
                repository, name = directory / parts[0] / parts[1], "/".join(parts[4:])
                if parts[0] == "gated":
                    self.refuse(403, "GatedRepo")
                elif not repository.is_dir():
                    self.refuse(401, "RepoNotFound")
                elif parts[3] not in ("main", COMMIT):
                    self.refuse(404, "RevisionNotFound")
                elif not (repository / name).is_file():
                    self.refuse(404, "EntryNotFound")
                else:
                    self.reply((repository / name).read_bytes(), body)

            def reply(self, content: bytes | None, body: bool) -> None:
                if content is None:
                    self.refuse(401, "RepoNotFound")
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _files(repository: Path) -> list[Path]:
    return sorted(path for path in repository.rglob("*") if path.is_file())


def description(repository: Path, name: str) -> bytes | None:
    """What the API tells of a repository."""
    if not repository.is_dir():
        return None
    siblings = [{"rfilename": str(path.relative_to(repository))} for path in _files(repository)]
    return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}).encode()


def tree(repository: Path) -> bytes | None:
    """The API's list of files."""
    if not repository.is_dir():
        return None
    entries = [
        {
            **{"type": "file", "path": str(path.relative_to(repository)), "size": path.stat().st_size},
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in _files(repository)
    ]
    return json.dumps(entries).encode()
