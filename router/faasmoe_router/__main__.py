"""`python -m faasmoe_router`: runs one router, configured by FAASMOE_* variables."""

import gc
import logging
import os
import sys
from typing import TYPE_CHECKING

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.start_phases import StartPhases
from faasmoe_router.config import RouterConfig
from faasmoe_router.errors import RouterConfigError
from faasmoe_transformers.errors import UnsupportedVersions

if TYPE_CHECKING:
    from faasmoe_router.process import RouterProcess

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2

logger = logging.getLogger("faasmoe_router")


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    phases = StartPhases()
    gc.disable()  # hundreds of thousands of objects are created now and stay
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)  # logs every batch
    try:
        die_with_parent()
        process = _create_process(RouterConfig.from_env(), phases)
    except (RouterConfigError, ParentDeathError) as error:
        print(f"faasmoe_router: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    finally:
        gc.freeze()
        gc.enable()
    has_failed = not process.serve()
    if process.is_stuck:
        # A thread that hangs in a forward pass would block the interpreter's exit.
        logger.critical("The engine thread hangs; exiting without joining it")
        logging.shutdown()
        os._exit(EXIT_FAILED)
    return EXIT_FAILED if has_failed else 0


def _create_process(config: RouterConfig, phases: StartPhases) -> "RouterProcess":
    # Imported late: torch takes seconds to import, and invalid settings should fail fast.
    from faasmoe_transformers.fast_import import prepare_fast_import
    from faasmoe_transformers.version_check import ROUTER_MODULES, check_private_names

    prepare_fast_import()
    try:
        check_private_names(ROUTER_MODULES)  # before the modules that import these names
    except UnsupportedVersions as error:
        raise RouterConfigError(str(error)) from error
    from faasmoe_router.process import RouterProcess

    phases.end("imports")
    return RouterProcess(config, phases)


if __name__ == "__main__":
    sys.exit(main())
