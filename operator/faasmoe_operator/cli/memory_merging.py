"""`faasmoe up --merge-memory`: lets the kernel keep equal memory pages of its processes once.

Kernel samepage merging (KSM) compares the anonymous pages of processes that take part and maps
equal ones once, until somebody writes to them. Routers of several models have many: what their
zygote's pages are again after Python's reference counts have gone up and down, and what each of
them has built alike. A process takes part by `prctl`, and with it what it forks and executes. That
pages are merged at all, and how fast, is decided by the machine's administrator.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from faasmoe_operator.errors import CommandError

KSM_RUN = Path("/sys/kernel/mm/ksm/run")
_PR_SET_MEMORY_MERGE = 67  # Linux 6.4; inherited by programs that are executed since 6.7


def merge_equal_pages(*, ksm_run: Path = KSM_RUN) -> None:
    """Have this process and all that it starts take part in merging.

    Args:
        ksm_run: file that says whether the kernel merges pages.

    Raises:
        CommandError: it does not, or cannot.
    """
    try:
        state = ksm_run.read_text().strip()
    except OSError as error:
        raise CommandError(
            f"--merge-memory: {ksm_run}: {error.strerror}; expected a kernel that merges equal "
            "pages (CONFIG_KSM)",
            exit_status=2,
        ) from error
    if state != "1":
        raise CommandError(
            f"--merge-memory: {ksm_run}: got {state}, expected 1, which this machine's "
            f"administrator sets: echo 1 > {ksm_run}",
            exit_status=2,
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_MEMORY_MERGE, 1, 0, 0, 0) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise CommandError(f"--merge-memory: {reason}; expected Linux 6.7 or later", exit_status=2)
