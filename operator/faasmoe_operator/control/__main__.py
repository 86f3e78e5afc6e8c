"""`python -m faasmoe_operator.control`: one model's control, configured by FAASMOE_* variables."""

from __future__ import annotations

import asyncio
import logging
import sys

from faasmoe_expert.lifeline import LifelineError, die_with_parent
from faasmoe_expert.store import StoreError
from faasmoe_operator.control.config import ControlConfig
from faasmoe_operator.control.process import serve
from faasmoe_operator.errors import FaasmoeError


def main() -> int:
    """Control a model until SIGTERM; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        die_with_parent()
        asyncio.run(serve(ControlConfig.from_env()))
    except (FaasmoeError, StoreError, LifelineError, OSError) as error:
        print(f"faasmoe_operator.control: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
