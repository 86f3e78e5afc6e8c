"""vLLM's worker on a CPU, with a KV cache that takes memory as it is used, and a choice of threads.

The number of threads is set before vLLM plans a pass, since its attention divides the work by it.
"""

from __future__ import annotations

import ctypes
import logging
import time
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from faasmoe_router.vllm_backend.thread_choice import ThreadChoice
from faasmoe_transformers.untouched_zeros import UntouchedZeros

logger = logging.getLogger(__name__)


class FunctionCpuWorker(CPUWorker):
    """A worker that chooses how many threads of OpenMP compute a pass.

    Takes vLLM's arguments. OpenMP's number of threads at the start is the largest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not torch's function: vLLM replaces it by one that does nothing, and oneDNN would forget
        # its primitives with each call. The number is that of the calling thread.
        self._set_num_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
        is_settable = self._set_num_threads is not None
        self._choice = ThreadChoice(torch.get_num_threads() if is_settable else 1)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache, which vLLM would write zeros to.

        Args:
            kv_cache_config: vLLM's configuration of the cache.
        """
        with UntouchedZeros():
            super().initialize_from_config(kv_cache_config)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Compute a pass; see vLLM's worker.

        Args:
            scheduler_output: what vLLM's scheduler has decided.
        """
        n_rows = scheduler_output.total_num_scheduled_tokens
        if not n_rows or self._set_num_threads is None:
            return super().execute_model(scheduler_output)
        self._set_num_threads(self._choice.choose(n_rows))
        started_s = time.perf_counter()
        output = super().execute_model(scheduler_output)
        chosen = self._choice.record(n_rows, time.perf_counter() - started_s)
        if chosen is not None:
            logger.info("Passes of about %d tokens are computed by %d threads now", n_rows, chosen)
        return output
