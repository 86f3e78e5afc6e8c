"""`python -m faasmoe_router.zygote [vllm]`: imports what a router needs, and forks routers.

With `vllm`, it imports what a router with that engine needs. A router that is killed is back
without the time of its imports, and shares their pages with the zygote. The launcher's requests
come over the socket of `faasmoe_contracts.fork_server`. What reads its environment when it is
loaded (OpenMP, malloc, OpenBLAS) has that of the zygote.
"""

from __future__ import annotations

import gc
import logging
import sys

from faasmoe_contracts.fork_server import ForkServer, ForkServerError
from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.start_phases import StartPhases
from faasmoe_router.__main__ import EXIT_BAD_CONFIG, configure_logging, import_router, serve_router
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.vllm_backend.zygote_imports import import_vllm

PROCESS_NAME = "faasmoe_router"

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until the launcher is gone; a forked child becomes a router. Returns its status."""
    phases = StartPhases()
    gc.disable()  # hundreds of thousands of objects are created now and stay
    configure_logging()
    try:
        is_vllm = sys.argv[1:] == ["vllm"]
        die_with_parent()
        if is_vllm:
            import_vllm()
        else:
            import_router()
        server = ForkServer.from_environment(process_name=PROCESS_NAME)
    except (RouterConfigError, ParentDeathError, ForkServerError) as error:
        print(f"faasmoe_router.zygote: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    gc.collect()
    gc.freeze()  # collectors of the routers skip these objects, so that their pages stay shared
    phases.end("imports")
    logger.info("The zygote's %s", phases.describe())
    return serve_router(StartPhases("fork")) if server.run() else 0


if __name__ == "__main__":
    sys.exit(main())
