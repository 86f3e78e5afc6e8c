"""How many cores the router takes while functions compute on the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def left_by(n_calls: int) -> Iterator[None]:
    """Compute in one thread, if functions that compute in one each take the other cores.

    Threads of one product wait for each other at its end, and on a core that somebody else has they
    wait for as long as the system gives that one. Where cores are left beyond the functions', all
    threads are used: to change their number to anything but one makes new ones.

    Args:
        n_calls: functions of this machine that are computing now.
    """
    whole = torch.get_num_threads()
    if not n_calls or whole == 1 or n_calls < whole - 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(whole)
