"""What the router's process asks a vLLM worker over vLLM's `collective_rpc`."""

from __future__ import annotations

from typing import Any

import torch

from faasmoe_router.vllm_backend.expert_calls import current_calls
from faasmoe_transformers.tensor_pages import release_pages


class FunctionWorkerExtension:
    """Methods that vLLM adds to its worker class.

    Attributes:
        model_runner: the worker's, which has the KV cache.
    """

    model_runner: Any

    def faasmoe_cost(self) -> tuple[float, float]:
        """Return what functions cost since the last call: seconds and GB-seconds."""
        cost = current_calls().read_cost()
        return cost.seconds, cost.gb_seconds

    def faasmoe_metrics(self) -> str:
        """Return the dispatcher's metrics in Prometheus' text format."""
        return current_calls().metrics_text().decode()

    def faasmoe_release_memory(self) -> None:
        """Free what the dispatcher keeps for its next calls."""
        current_calls().release_memory()

    def faasmoe_release_cache(self) -> None:
        """Free the memory of a KV cache on the host that has nothing cached.

        vLLM writes zeros to all of a new cache, which makes all of it resident.
        """
        caches = [c for c in self.model_runner.kv_caches if isinstance(c, torch.Tensor)]
        storages = {cache.untyped_storage().data_ptr(): cache for cache in caches}
        for cache in storages.values():  # layers share one
            release_pages(
                torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())
            )
