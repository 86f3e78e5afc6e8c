"""What the router's process asks a vLLM worker over vLLM's `collective_rpc`."""

from __future__ import annotations

from faasmoe_router.vllm_backend.expert_calls import current_calls


class FunctionWorkerExtension:
    """Methods that vLLM adds to its worker class."""

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
