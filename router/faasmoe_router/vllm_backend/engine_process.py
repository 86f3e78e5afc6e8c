"""vLLM's engine as a fork of the router, which has imported everything already.

On a CPU vLLM would start its engine as a new process, which imports vLLM for as long as the router
has. A fork is safe while its parent has one thread: no lock is held then, and OpenMP, whose threads
do not survive a fork, has none yet. So the engine is forked as early as its configuration is known,
and loads the model while the router builds its API; vLLM's client joins it later.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.network_utils import get_open_zmq_ipc_path
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.utils import CoreEngineLaunch, EngineZmqAddresses, launch_core_engines
from vllm.v1.executor import Executor

logger = logging.getLogger(__name__)

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
TASKS = "/proc/self/task"


class EngineProcess:
    """vLLM's engine, started as a process of its own before its client.

    Args:
        vllm_config: vLLM's configuration.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._addresses = EngineZmqAddresses(
            inputs=[get_open_zmq_ipc_path()], outputs=[get_open_zmq_ipc_path()]
        )
        self._starting = ExitStack()
        with start_method(vllm_config):
            self._launch: CoreEngineLaunch = self._starting.enter_context(
                launch_core_engines(
                    vllm_config, Executor.get_class(vllm_config), True, self._addresses
                )
            )
        # vLLM's end of this context answers the engine, and returns once that has started.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-start")
        self._started = self._executor.submit(self._starting.close)
        self._executor.shutdown(wait=False)

    @property
    def client_addresses(self) -> dict[str, Any]:
        """Where a client of vLLM's has to listen for this engine."""
        (input_address,), (output_address,) = self._addresses.inputs, self._addresses.outputs
        return {"input_address": input_address, "output_address": output_address}

    async def wait_started(self) -> None:
        """Wait until it can compute; raises RuntimeError if it has ended instead."""
        await asyncio.wrap_future(self._started)

    def join(self, client: AsyncLLM) -> None:
        """Have a client watch this engine, and end it with itself."""
        core: Any = client.engine_core
        core.resources.engine_manager = self._launch.engine_manager
        core.start_engine_core_monitor()

    def close(self) -> None:
        """End the engine."""
        assert self._launch.engine_manager is not None
        self._launch.engine_manager.shutdown(timeout=0)


@contextmanager
def start_method(vllm_config: VllmConfig) -> Iterator[None]:
    """Have vLLM fork its engine, where that is safe and it would start a new process.

    Workers that share layers stay new processes: each needs an environment of its own.
    """
    method = os.environ.get(START_METHOD)
    n_threads = len(os.listdir(TASKS))
    if method == "spawn" and vllm_config.parallel_config.world_size == 1:
        if n_threads == 1:
            os.environ[START_METHOD] = "fork"
        else:
            logger.warning("vLLM's engine imports vLLM again: the router has %d threads", n_threads)
    is_collecting = gc.isenabled()
    gc.enable()  # in a forked engine too
    try:
        yield
    finally:
        if method is not None:
            os.environ[START_METHOD] = method
        if not is_collecting:
            gc.disable()
