"""`python -m faasmoe_operator.control`: a control process, configured by FAASMOE_* variables.

It is of one model (FAASMOE_MODEL_FILE), or of all models of a machine (FAASMOE_MODELS_FILE). It can
do nothing before the zygote is there, so it begins its own imports when the zygote has done its:
until then, the router and the zygote have the cores to themselves.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.start_phases import StartPhases

ZYGOTE_SOCKET_ENV = "FAASMOE_ZYGOTE_SOCKET"
MODELS_FILE_ENV = "FAASMOE_MODELS_FILE"
ZYGOTE_WAIT_S = 3.0
ZYGOTE_POLL_S = 0.01


def main() -> int:
    """Run the control process until SIGTERM; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    phases = StartPhases()
    try:
        die_with_parent()
    except ParentDeathError as error:
        return _fail(error)
    wait_for_zygote(os.environ.get(ZYGOTE_SOCKET_ENV, ""))
    phases.end("zygote")
    return _run(phases)


def wait_for_zygote(socket: str, *, timeout_s: float = ZYGOTE_WAIT_S) -> None:
    """Wait until the zygote's socket exists, for a limited time: this only saves contention.

    Args:
        socket: path of the socket; empty to return at once.
        timeout_s: how long to wait at most.
    """
    deadline_s = time.monotonic() + timeout_s
    while socket and not Path(socket).exists() and time.monotonic() < deadline_s:
        time.sleep(ZYGOTE_POLL_S)


def _run(phases: StartPhases) -> int:
    import asyncio

    from faasmoe_contracts.store import StoreError
    from faasmoe_operator.control.config import ControlConfig, MachineConfig
    from faasmoe_operator.control.process import run_controller, run_until_terminated
    from faasmoe_operator.errors import FaasmoeError

    phases.end("imports")
    try:
        if os.environ.get(MODELS_FILE_ENV):
            from faasmoe_operator.control.machine import run_machine

            work = run_machine(MachineConfig.from_env(), phases)
        else:
            work = run_controller(ControlConfig.from_env(), phases)
        asyncio.run(run_until_terminated(work))
    except (FaasmoeError, StoreError, OSError) as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    print(f"faasmoe_operator.control: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
