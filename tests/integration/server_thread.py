"""Runs the router's server in a thread of the test process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from faasmoe_gateway.server import Server

DEADLINE_S = 120.0


@contextmanager
def running_server(server: Server) -> Iterator[str]:
    """Serve on a loopback port for the lifetime of the context; yields the base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end_s = time.monotonic() + DEADLINE_S
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                assert time.monotonic() < end_s, "the server did not start in time"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "the server did not stop in time"
