"""`python -m faasmoe_operator.control`: one model's control process, configured by FAASMOE_*."""

from __future__ import annotations

import asyncio
import logging
import sys

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.start_phases import StartPhases
from faasmoe_contracts.store import StoreError
from faasmoe_operator.control.config import ControlConfig
from faasmoe_operator.control.process import run_control_process
from faasmoe_operator.errors import FaasmoeError


def main() -> int:
    """Run the control process until SIGTERM; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        die_with_parent()
        phases = StartPhases("imports")
        asyncio.run(run_control_process(ControlConfig.from_env(), phases))
    except (FaasmoeError, StoreError, ParentDeathError, OSError) as error:
        print(f"faasmoe_operator.control: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
