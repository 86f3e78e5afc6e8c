"""`python -m faasmoe_router.zygote [vllm]`: imports what a router needs, and forks routers.

With `vllm`, it imports what a router with that engine needs. A router that is killed is back
without the time of its imports, and shares their pages with the zygote. The launcher's requests
come over the socket of `faasmoe_contracts.fork_server`. What reads its environment when it is
loaded (OpenMP, malloc, OpenBLAS) has that of the zygote.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import linecache
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from faasmoe_contracts.fork_server import ForkServer, ForkServerError
from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.start_phases import StartPhases
from faasmoe_contracts.store import Store
from faasmoe_expert.file_pages import release_unchanged_pages
from faasmoe_expert.malloc import HOLES
from faasmoe_router.__main__ import EXIT_BAD_CONFIG, configure_logging, import_router, serve_router
from faasmoe_router.config import RouterConfig
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.vllm_backend.openmp_preload import preload_openmp
from faasmoe_router.vllm_backend.zygote_imports import import_vllm

PROCESS_NAME = "faasmoe_router"
MODEL_FOLDER = "model"  # of a store
CUDA_DEVICE = Path("/dev/nvidiactl")
LATE_IMPORTS = (
    *("encodings.idna", "pydantic.v1", "fastapi.telemetry._runtime"),
    *("uvicorn.lifespan.on", "uvicorn.loops.uvloop"),
    *("anyio._backends._asyncio", "anyio._core._sockets"),
)
"""What libraries import only when a router starts or has its first request."""

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
            preload_openmp()
            import_vllm()
        else:
            import_router()
            import_late()
        server = ForkServer.from_environment(
            process_name=PROCESS_NAME,
            before_fork=lambda environment: None if is_vllm else prepare_parts(environment),
        )
    except (RouterConfigError, ParentDeathError, ForkServerError) as error:
        print(f"faasmoe_router.zygote: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    linecache.clearcache()  # sources that libraries have looked at
    HOLES.fill()
    release_unchanged_pages()
    # Collectors of the routers skip these objects, so that their pages stay shared. What garbage
    # there is stays: it would leave holes.
    gc.freeze()
    phases.end("imports")
    logger.info("The zygote's %s", phases.describe())
    if not server.run():
        return 0
    status = serve_router(StartPhases("fork"))
    if not is_vllm:  # whose libraries clean up when the interpreter ends
        end_process(status)
    return status


def import_late() -> None:
    """Import what libraries would import in each router; what this version lacks, none needs."""
    for name in LATE_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from faasmoe_gateway.server import prepare_logging
    from faasmoe_router.version import FINGERPRINTED_PACKAGES, system_fingerprint_of

    prepare_logging()

    system_fingerprint_of("", "", "", FINGERPRINTED_PACKAGES)  # reads versions, which it keeps


def prepare_parts(environment: Mapping[str, str]) -> None:
    """Make what a router inherits that equal models share: family, model, tokenizer.

    The router meets what is wrong with its files again, and reports it as its own error.

    Args:
        environment: the router's.
    """
    import torch

    from faasmoe_expert.functions.verification import VERIFIED_DIR_ENV, VerifiedBlocks
    from faasmoe_router.compute_dtype import select_compute_dtype
    from faasmoe_router.engine.tokenizer_cache import TOKENIZERS
    from faasmoe_router.model_loader import prepare_model

    try:
        config = RouterConfig.from_env(environment)
        TOKENIZERS.get(config.store / MODEL_FOLDER).compile_template()
        if config.device == "cpu" or not CUDA_DEVICE.exists():  # asking CUDA would forbid to fork
            store, cpu = Store.open(config.store), torch.device("cpu")
            selected = select_compute_dtype(config.dtype, store, cpu, compute=config.compute)
            verified_dir = environment.get(VERIFIED_DIR_ENV)
            prepare_model(
                store,
                selected.dtype,
                user=config.model_name or str(config.store),
                compute=config.compute,
                verified_blocks=VerifiedBlocks(Path(verified_dir) if verified_dir else None),
            )
    except Exception as error:  # a broken file raises whatever its parser does
        logger.info("A router inherits less than others: %s", error)
    HOLES.fill()
    gc.freeze()


def end_process(status: int) -> NoReturn:
    """End a forked router that has served, without freeing its objects one by one.

    They lie on pages of the zygote, each of which would be copied to be written to.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
