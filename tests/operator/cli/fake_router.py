"""The zygote of a fake router without a model.

The router is healthy at once. FAKE_ROUTER_UNHEALTHY makes it answer 503, FAKE_ROUTER_FAILS makes
it exit.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

from faasmoe_contracts.fork_server import ForkServer
from faasmoe_contracts.parent_death import die_with_parent


class HealthHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if os.environ.get("FAKE_ROUTER_UNHEALTHY") else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        return None


def main() -> None:
    die_with_parent()
    if not ForkServer.from_environment(process_name="fake_router").run():
        return
    if os.environ.get("FAKE_ROUTER_FAILS"):
        sys.exit("the router has no model")
    assert os.environ["FAASMOE_TOKEN"]
    print(f"control {os.environ['FAASMOE_CONTROL_URL']}", flush=True)
    if file := os.environ.get("FAASMOE_TENANTS_FILE"):
        print(f"tenants {json.dumps(json.loads(Path(file).read_text()))}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if path := os.environ.get("FAASMOE_LISTEN_PATH"):
        Path(path).unlink(missing_ok=True)
        UnixStreamServer(path, HealthHandler).serve_forever()
    server = HTTPServer(("127.0.0.1", 0), HealthHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(os.environ["FAASMOE_LISTEN_FD"]))
    server.serve_forever()


if __name__ == "__main__":
    main()
