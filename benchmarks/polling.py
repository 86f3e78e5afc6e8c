"""A thread that looks at something again and again while a benchmark runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def polling(look: Callable[[], None], *, interval_s: float) -> Iterator[None]:
    """Call a function every `interval_s` seconds within the context, and once at its end."""
    is_over = threading.Event()

    def poll() -> None:
        while not is_over.wait(interval_s):
            look()
        look()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
