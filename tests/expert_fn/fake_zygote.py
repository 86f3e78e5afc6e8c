"""A zygote whose sandboxes need no torch, run as a script instead of `-m faasmoe_expert.zygote`.

Its sandboxes answer /readyz and keep functions in a dictionary. A sandbox with threads=99 exits
immediately; one with threads=98 never answers and ignores SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from faasmoe_expert import zygote

ENDS_AT_ONCE, NEVER_ANSWERS = 99, 98


class Handler(BaseHTTPRequestHandler):
    functions: dict[str, Any] = {}  # noqa: RUF012  one process holds one sandbox

    def do_GET(self) -> None:
        if self.path == "/readyz":
            return self.respond(200, {"status": "ready"})
        attached = [{"id": name, **body, "size_bytes": 1} for name, body in self.functions.items()]
        return self.respond(200, {"sandbox": {"pid": os.getpid()}, "functions": attached})

    def do_PUT(self) -> None:
        if self.headers["Authorization"] != f"Bearer {os.environ['FAASMOE_TOKEN']}":
            error = {"code": "unauthorized", "message": "authorization: expected the token"}
            return self.respond(401, {"error": error})
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/functions":
            specs = {spec.pop("id"): spec for spec in body.pop("functions")}
            self.functions.update({name: {**body, **spec} for name, spec in specs.items()})
            return self.respond(200, {"functions": [{"id": name} for name in specs]})
        self.functions[self.path.rpartition("/")[2]] = body
        return self.respond(201, {})

    def do_DELETE(self) -> None:
        if self.functions.pop(self.path.rpartition("/")[2], None) is None:
            return self.respond(404, {"error": {"code": "unknown_function", "message": "id"}})
        return self.respond(204, None)

    def respond(self, status: int, value: dict[str, Any] | None) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        if value is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return None


class Server(HTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected clients; report all other errors."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(config: dict[str, Any], listener: socket.socket) -> None:
    print(f"sandbox {config['id']} begins", flush=True)
    if config.get("threads") == ENDS_AT_ONCE:
        sys.exit(3)
    if config.get("threads") == NEVER_ANSWERS:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = Server((config["host"], config["port"]), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    sys.exit(zygote.main(lambda: serve))
