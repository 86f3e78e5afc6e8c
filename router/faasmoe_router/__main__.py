"""`python -m faasmoe_router`: runs one router, configured by FAASMOE_* variables."""

from __future__ import annotations

import gc
import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.start_phases import StartPhases
from faasmoe_router.config import RouterConfig, VllmArguments
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.vllm_backend.compatibility import (
    computes_on_cpu,
    installed_vllm,
    select_engine,
)
from faasmoe_router.vllm_backend.openmp_preload import preload_openmp
from faasmoe_transformers.errors import UnsupportedVersions

if TYPE_CHECKING:
    from faasmoe_router.process import RouterProcess
    from faasmoe_router.vllm_backend.process import VllmRouterProcess

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
SWITCH_INTERVAL_S = 0.0005
"""Thread switch interval: the event loop acquires the GIL once per iteration, and a request takes
several, each of which would wait for the engine's thread for 5 ms (Python's default)."""

logger = logging.getLogger("faasmoe_router")


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    phases = StartPhases()
    configure_logging()
    return serve_router(phases)


def configure_logging() -> None:
    """Log to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)  # logs every batch


def serve_router(phases: StartPhases) -> int:
    """Serve with the settings in the environment until a signal; return the exit status.

    Args:
        phases: the phases of the start so far.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.disable()  # hundreds of thousands of objects are created now and stay
    try:
        die_with_parent()
        config = RouterConfig.from_env()  # before the imports: invalid settings should fail fast
        process = _create_process(config, phases)
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


def _create_process(config: RouterConfig, phases: StartPhases) -> RouterProcess | VllmRouterProcess:
    """Return the process of the engine that the settings select; raises RouterConfigError."""
    if _selected_engine(config) == "vllm":
        from faasmoe_router.vllm_backend.process import VllmRouterProcess

        phases.end("imports")
        return VllmRouterProcess(config, phases)
    if config.engine_args != VllmArguments():
        raise RouterConfigError(
            "FAASMOE_ENGINE_ARGS: got arguments of vLLM, expected none: auto is the engine "
            "transformers here"
        )
    import_router()
    from faasmoe_router.process import RouterProcess

    phases.end("imports")
    return RouterProcess(config, phases)


def _selected_engine(config: RouterConfig) -> str:
    """Return transformers or vllm; `compute` says how the former computes."""
    vllm_version = installed_vllm()
    is_open = config.engine == "auto" and config.compute == "auto" and vllm_version is not None
    if config.engine != "vllm" and not is_open:
        return "transformers"
    preload_openmp()  # before torch; a zygote has done so before it forked this process
    from faasmoe_router.data_plane import open_store, read_model_config

    store = open_store(config.store)
    return select_engine(
        config.engine,
        store.manifest.model.architecture,
        vllm_version,
        cpu_config=read_model_config(store) if computes_on_cpu() else None,
    )


@cache  # looking at these names again would copy 8 MB of a zygote's pages
def import_router() -> None:
    """Import everything that a router needs, once; torch alone takes seconds.

    Raises:
        RouterConfigError: torch or transformers lack a private name that the router uses.
    """
    from faasmoe_transformers.fast_import import prepare_fast_import
    from faasmoe_transformers.version_check import ROUTER_MODULES, check_private_names

    prepare_fast_import()
    try:
        check_private_names(ROUTER_MODULES)  # before the modules that import these names
    except UnsupportedVersions as error:
        raise RouterConfigError(str(error)) from error
    import faasmoe_router.process  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
