"""How soon a thread gets the interpreter's lock (GIL) back after a native call.

Python takes the lock from its holder once another thread has waited for
`sys.getswitchinterval()`. The engine's thread gives it away for each step's native call, and the
event loop, which serves requests meanwhile, would keep it for that long after the call has
returned: several times the time that it has work for. So the interval is short while the call
runs, and as it was while the engine's thread computes in Python, which is soon over.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NATIVE_INTERVAL_S = 0.00005
"""Shorter ones would have the event loop and threads beside it change places all the time."""


class NativeSections:
    """Native calls that run now; the usual interval applies while there is none. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_running = 0
        self._usual_s = 0.0

    @contextmanager
    def native(self) -> Iterator[None]:
        """Have other threads give the lock back at once within the context."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @contextmanager
    def python(self) -> Iterator[None]:
        """Leave a native call's context for a while: it calls back."""
        self._change(-1)
        try:
            yield
        finally:
            self._change(1)

    def _change(self, difference: int) -> None:
        with self._lock:
            if not self._n_running:
                self._usual_s = sys.getswitchinterval()
            self._n_running += difference
            is_native = self._n_running > 0
            sys.setswitchinterval(
                min(NATIVE_INTERVAL_S, self._usual_s) if is_native else self._usual_s
            )


native_sections = NativeSections()
"""Of this process, as the interval is."""
