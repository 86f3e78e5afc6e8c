"""Asks ejected sandboxes whether they are ready, in a thread of its own: they may hang."""

from __future__ import annotations

import http.client
import queue
import threading
from collections.abc import Iterable, Iterator

PROBE_TIMEOUT_S = 1.0
READY = "/readyz"


class Prober:
    """Probes addresses; the thread runs from the first probe on until `close`."""

    def __init__(self, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._asked: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, addresses: Iterable[str]) -> None:
        """Begin to probe addresses."""
        for address in addresses:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prober", daemon=True)
                self._thread.start()
            self._asked.put(address)

    def found(self) -> Iterator[tuple[str, bool]]:
        """Give the addresses probed since, and whether each is ready; does not wait."""
        while True:
            try:
                yield self._found.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """End the thread, after the probe that it is at."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._asked.put(None)
            thread.join()

    def _run(self) -> None:
        while (address := self._asked.get()) is not None:
            self._found.put((address, is_ready(address, timeout_s=self._timeout_s)))


def is_ready(address: str, *, timeout_s: float) -> bool:
    """Return whether a sandbox says that it is ready."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        connection.request("GET", READY)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
