"""The router's metrics registry and the engine's metrics.

Engine metrics use vLLM's names, labels and buckets, so vLLM's dashboards work unchanged. Other
modules register their own collectors on the same registry.
"""

import asyncio
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

FINISHED_REASONS = ("stop", "length", "abort", "error")


def new_registry() -> CollectorRegistry:
    """Return a registry with metrics of the process, the platform and the event loop."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    tasks = Gauge("faasmoe_router_event_loop_tasks", "Number of asyncio tasks.", registry=registry)
    tasks.set_function(_count_event_loop_tasks)
    return registry


def _count_event_loop_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no event loop runs in this thread
        return 0


class EngineMetrics:
    """The engine's metrics, labelled with the name of the served model.

    Args:
        registry: registry of the collectors.
        model_name: value of the label `model_name`.

    Attributes:
        prompt_tokens: prompt tokens computed.
        generation_tokens: tokens generated.
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: prompt tokens found in the prefix cache.
        resumed_requests: requests resumed after an engine restart.
        time_to_first_token_s: seconds from arrival to the first token.
        inter_token_latency_s: seconds between successive outputs of a sequence.
        e2e_latency_s: seconds from arrival to the last token.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counter(name: str, description: str) -> Counter:
            metric = Counter(f"vllm:{name}", description, ["model_name"], registry=registry)
            return metric.labels(model_name)

        def gauge(name: str, description: str) -> Gauge:
            metric = Gauge(f"vllm:{name}", description, ["model_name"], registry=registry)
            return metric.labels(model_name)

        def histogram(name: str, description: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(
                f"vllm:{name}_seconds",
                description,
                ["model_name"],
                registry=registry,
                buckets=buckets,
            )
            return metric.labels(model_name)

        self._model_name = model_name
        self._running = gauge("num_requests_running", "Number of running requests.")
        self._waiting = gauge("num_requests_waiting", "Number of waiting requests.")
        self._kv_cache_usage = gauge(
            "kv_cache_usage_perc", "Part of the KV cache that requests take, from 0 to 1."
        )
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "Size of the KV cache, in labels.",
            ["model_name", "block_size", "num_gpu_blocks"],
            registry=registry,
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._success = Counter(
            "vllm:request_success",
            "Finished requests by finish reason.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        for reason in FINISHED_REASONS:
            self._success.labels(model_name, reason)
        self.resumed_requests = Counter(
            "faasmoe_router_resumed_requests",
            "Requests resumed from their tokens after an engine restart.",
            ["model_name"],
            registry=registry,
        ).labels(model_name)
        self.time_to_first_token_s = histogram(
            "time_to_first_token",
            "Time from a request's arrival to its first token.",
            FIRST_TOKEN_BUCKETS_S,
        )
        self.inter_token_latency_s = histogram(
            "inter_token_latency", "Time between two tokens of a request.", TOKEN_BUCKETS_S
        )
        self.e2e_latency_s = histogram(
            "e2e_request_latency",
            "Time from a request's arrival to its last token.",
            REQUEST_BUCKETS_S,
        )

    def observe_requests(self, read_counts: Callable[[], tuple[int, int]]) -> None:
        """Read the numbers of running and waiting requests whenever metrics are scraped."""
        self._running.set_function(lambda: read_counts()[0])
        self._waiting.set_function(lambda: read_counts()[1])

    def observe_kv_cache(self, read_usage: Callable[[], float]) -> None:
        """Read the taken part of the KV cache, from 0 to 1, whenever metrics are scraped."""
        self._kv_cache_usage.set_function(read_usage)

    def set_cache_config(self, *, n_pages: int, page_tokens: int) -> None:
        """Set the size of the KV cache: pages (vLLM's blocks) and tokens of each."""
        self._cache_config.clear()
        self._cache_config.labels(self._model_name, page_tokens, n_pages).set(1)

    def record_finished(self, reason: str) -> None:
        """Count a finished request by its reason: stop, length, abort or error."""
        self._success.labels(self._model_name, reason).inc()
