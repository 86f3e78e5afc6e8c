"""A process's lifeline: it ends when the process that started it ends, however that ended.

Linux only (prctl). Imports neither torch nor any other part of the package, so that a process can
call it before anything slow.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

PARENT_PID_ENV = "FAASMOE_PARENT_PID"
"""Set by a parent for the children that are to end with it: its own process id."""

_PR_SET_PDEATHSIG = 1


class ParentDeathError(RuntimeError):
    """The lifeline could not be tied."""


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies; SIGKILL of the parent included.

    The kernel watches the *thread* that forked this process: parents must fork from a thread that
    lives as long as they do. If the parent is already gone, this process ends here. A process that
    was started by hand (no variable, no argument) is left alone.

    Args:
        parent_pid: the parent; if left out, what the environment says.

    Raises:
        LifelineError: the variable is no process id, or the kernel refused.
    """
    if parent_pid is None:
        parent_pid = _parent_pid_from_env(os.environ)
    if parent_pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise ParentDeathError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def _parent_pid_from_env(env: Mapping[str, str]) -> int | None:
    text = env.get(PARENT_PID_ENV, "")
    if not text:
        return None
    if not text.isdigit():
        raise ParentDeathError(f"{PARENT_PID_ENV}: got {text!r}, expected a process id")
    return int(text)
