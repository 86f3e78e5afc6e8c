"""A model hub on loopback: what huggingface_hub asks for to download the files of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
"""Variables that a client of this hub must not have."""
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Hub:
    """A running hub.

    Attributes:
        url: its base URL, for HF_ENDPOINT.
        requests: method and path of every request so far.
    """

    url: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def running_hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve folders as repositories ORG/NAME with one commit, at any branch."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repositories, requests))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", requests)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(repositories: dict[str, Path], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            match path.removeprefix("/").split("/"):
                case ["api", "models", organisation, name, *rest]:
                    self._api(f"{organisation}/{name}", rest)
                case [organisation, name, "resolve", _, *file]:
                    self._file(f"{organisation}/{name}", "/".join(file))
                case _:
                    self._respond(404, {})

        do_HEAD = do_GET

        def _api(self, repository: str, rest: list[str]) -> None:
            folder = repositories.get(repository)
            if folder is None:
                self._respond(404, {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["tree"]:
                self._json([_tree_entry(folder, path) for path in _files(folder)])
            else:
                names = (path.relative_to(folder).as_posix() for path in _files(folder))
                siblings = [{"rfilename": name} for name in names]
                self._json({"id": repository, "sha": COMMIT, "siblings": siblings})

        def _file(self, repository: str, name: str) -> None:
            path = repositories[repository] / name
            if not path.is_file():
                self._respond(404, {"X-Error-Code": "EntryNotFound"})
                return
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._respond(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content)

        def _json(self, value: Any) -> None:
            self._respond(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def _respond(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for header in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(*header)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _tree_entry(folder: Path, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    entry = {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.suffix in (".safetensors", ".gguf"):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry
