"""Ends a process when its parent dies, even if the parent is killed (PR_SET_PDEATHSIG).

Linux only. Imports nothing slow, so that a process can call it before its other imports.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

PARENT_PID_ENV = "FAASMOE_PARENT_PID"
"""Environment variable with the parent's process ID; set by parents for their children."""

_PR_SET_PDEATHSIG = 1


class ParentDeathError(RuntimeError):
    """Raised if the parent-death signal cannot be set."""


def die_with_parent(parent_pid: int | None = None) -> None:
    """Make the kernel send SIGKILL to this process when its parent dies.

    The kernel watches the *thread* that forked this process, so parents must fork from a thread
    that lives as long as they do. If the parent has died already, this process is killed here. Does
    nothing without a parent (no argument, no FAASMOE_PARENT_PID), as in a shell.

    Args:
        parent_pid: process ID of the parent; read from FAASMOE_PARENT_PID if None.

    Raises:
        ParentDeathError: the variable is not a process ID, or prctl failed.
    """
    if parent_pid is None:
        parent_pid = _parent_pid_from_env(os.environ)
    if parent_pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise ParentDeathError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:  # the parent died before prctl
        os.kill(os.getpid(), signal.SIGKILL)


def _parent_pid_from_env(env: Mapping[str, str]) -> int | None:
    text = env.get(PARENT_PID_ENV, "")
    if not text:
        return None
    if not text.isdigit():
        raise ParentDeathError(f"{PARENT_PID_ENV}: got {text!r}, expected a process id")
    return int(text)
