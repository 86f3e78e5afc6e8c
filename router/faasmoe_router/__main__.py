"""`python -m faasmoe_router`: one router, configured by FAASMOE_* variables."""

import logging
import os
import sys
from typing import TYPE_CHECKING

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_router.config import RouterConfig
from faasmoe_router.errors import RouterConfigError

if TYPE_CHECKING:
    from faasmoe_router.process import RouterProcess

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2

logger = logging.getLogger("faasmoe_router")


def main() -> int:
    """Serve until SIGTERM; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for logger_name in (
        "ContinuousBatchingLogger",
        "httpx",
    ):  # one line for each batch, each report
        logging.getLogger(logger_name).setLevel(logging.WARNING)
    try:
        die_with_parent()
        process = _create_process(RouterConfig.from_env())
    except (RouterConfigError, ParentDeathError) as error:
        print(f"faasmoe_router: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    has_failed = not process.serve()
    if process.is_stuck:
        # A thread that hangs in a forward pass would keep the interpreter from ending.
        logger.critical("The engine thread hangs; exiting without joining it")
        logging.shutdown()
        os._exit(EXIT_FAILED)
    return EXIT_FAILED if has_failed else 0


def _create_process(config: RouterConfig) -> "RouterProcess":
    # Imported late: torch takes seconds, and a bad setting should be told at once.
    from faasmoe_router.process import RouterProcess

    return RouterProcess(config)


if __name__ == "__main__":
    sys.exit(main())
