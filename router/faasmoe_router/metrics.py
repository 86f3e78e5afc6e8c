"""The router's metrics registry and the engine's metrics.

Engine metrics use vLLM's names, labels and buckets, so vLLM's dashboards work unchanged, and those
of production-stack (`tests/router/dashboard_metrics.json` lists what they read). Other modules
register their own collectors on the same registry. Where a request is traced, histograms keep its
trace id as an exemplar, which OpenMetrics has and the older text format has not.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from faasmoe_router.sequence_times import SequenceCounts, SequenceTimes

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

OPENMETRICS, OPENMETRICS_VERSION = "application/openmetrics-text", "1.0.0"
MAX_TOKEN_BUCKET = 1 << 20
TOKEN_COUNT_BUCKETS = tuple(
    float(mantissa * 10**exponent)
    for exponent in range(7)
    for mantissa in (1, 2, 5)
    if mantissa * 10**exponent <= MAX_TOKEN_BUCKET
)
CHOICE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTION_BUCKETS = (0.0, 1.0, 2.0, 5.0, 10.0)
RATE_WINDOW_S = 60.0

FINISHED_REASONS = ("stop", "length", "abort", "error")


def new_registry() -> CollectorRegistry:
    """Return a registry with metrics of the process, the platform and the event loop."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    tasks = Gauge("faasmoe_router_event_loop_tasks", "Number of asyncio tasks.", registry=registry)
    tasks.set_function(_count_event_loop_tasks)
    return registry


def render_metrics(registry: Collector, *, accept: str) -> tuple[bytes, str]:
    """Return all metrics in the format that a scraper accepts, and its content type.

    Args:
        registry: the metrics.
        accept: the request's `Accept` header; OpenMetrics has exemplars.
    """
    if OPENMETRICS not in accept:
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
    # No name needs escaping, whatever the scraper asks for, and the library's escaping with
    # underscores replaces the colons of vLLM's names.
    body = generate_openmetrics(registry, escaping=ALLOWUTF8, version=OPENMETRICS_VERSION)
    return body, f"{OPENMETRICS}; version={OPENMETRICS_VERSION}; charset=utf-8"


class RequestRate:
    """Requests per second over the last window; times are passed in.

    Args:
        window_s: length of the window.
    """

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._counts: dict[int, int] = {}  # by whole second

    def add(self, now_s: float) -> None:
        """Count a request."""
        self._prune(now_s)
        self._counts[int(now_s)] = self._counts.get(int(now_s), 0) + 1

    def per_second(self, now_s: float) -> float:
        """Return the rate."""
        self._prune(now_s)
        return sum(self._counts.values()) / self._window_s

    def _prune(self, now_s: float) -> None:
        for second in [s for s in self._counts if s <= now_s - self._window_s]:
            del self._counts[second]


def _count_event_loop_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no event loop runs in this thread
        return 0


REQUEST_DURATIONS = {
    "e2e_request_latency": "Time from a request's arrival to its last token.",
    "request_queue_time": "Time of a request in the queue.",
    "request_prefill_time": "Time from the queue to a request's first token.",
    "request_decode_time": "Time from a request's first token to its last.",
    "request_inference_time": "Time from the queue to a request's last token.",
}
REQUEST_TOKENS = {
    "request_prompt_tokens": "Tokens of a request's prompt.",
    "request_generation_tokens": "Tokens generated for a request.",
    "request_max_num_generation_tokens": "Most tokens generated for one choice of a request.",
    "request_params_max_tokens": "Most tokens that a request asks for.",
}


def _exemplar(trace_id: str) -> dict[str, str] | None:
    return {"trace_id": trace_id} if trace_id else None


class EngineMetrics:
    """The engine's metrics, labelled with the name of the served model.

    Args:
        registry: registry of the collectors.
        model_name: value of the label `model_name`.

    Attributes:
        prompt_tokens: prompt tokens computed.
        generation_tokens: tokens generated.
        resumed_requests: requests resumed after an engine restart.
        preemptions: sequences that gave up their place to another tenant's.
        inter_token_latency_s: seconds between successive outputs of a sequence.
        n_computed_tokens: tokens computed so far, of prompts and answers.
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
                f"vllm:{name}",
                description,
                ["model_name"],
                registry=registry,
                buckets=buckets,
            )
            return metric.labels(model_name)

        self._model_name = model_name
        self._running = gauge("num_requests_running", "Number of running requests.")
        self._waiting = gauge("num_requests_waiting", "Number of waiting requests.")
        self._add_states(registry)
        self._kv_cache_usage = gauge(
            "kv_cache_usage_perc", "Part of the KV cache that requests take, from 0 to 1."
        )
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "Size of the KV cache, in labels.",
            [
                "model_name",
                "block_size",
                "num_gpu_blocks",
                "kv_cache_size_tokens",
                "kv_cache_max_concurrency",
            ],
            registry=registry,
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._prefix_queries = [
            counter(name, "Prompt tokens looked up in the prefix cache.")
            for name in ("prefix_cache_queries", "gpu_prefix_cache_queries")
        ]
        self._prefix_hits = [
            counter(name, "Prompt tokens found in the prefix cache.")
            for name in ("prefix_cache_hits", "gpu_prefix_cache_hits")
        ]
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens found in a cache.")
        sources = Counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens computed, and found in the prefix cache.",
            ["model_name", "source"],
            registry=registry,
        )
        self._computed_source, self._cached_source = (
            sources.labels(model_name, source) for source in ("local_compute", "local_cache_hit")
        )
        self._rate = RequestRate()
        self._add_server_gauges(registry)
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
        self.preemptions = counter(
            "num_preemptions", "Times that a running request gave up its place."
        )
        self._request_preemptions = histogram(
            "request_num_preemptions", "Times that a request gave up its place.", PREEMPTION_BUCKETS
        )
        rejections = Counter(
            "vllm:admission_rejections",
            "Sequences refused because the queue was full.",
            ["model_name", "reason"],
            registry=registry,
        )
        self.admission_rejections = rejections.labels(model_name, "max_num_queued_reqs")
        self._time_to_first_token_s = histogram(
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            FIRST_TOKEN_BUCKETS_S,
        )
        self.inter_token_latency_s = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a request.", TOKEN_BUCKETS_S
        )
        self._time_per_output_token_s = histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first.",
            TOKEN_BUCKETS_S,
        )
        self._durations_s = {
            name: histogram(f"{name}_seconds", description, REQUEST_BUCKETS_S)
            for name, description in REQUEST_DURATIONS.items()
        }
        self._tokens = {
            name: histogram(name, description, TOKEN_COUNT_BUCKETS)
            for name, description in REQUEST_TOKENS.items()
        }
        self.n_computed_tokens = 0
        self._step_tokens = histogram(
            "iteration_tokens_total",
            "Prompt and new tokens of one step.",
            TOKEN_COUNT_BUCKETS,
        )
        self._choices = histogram(
            "request_params_n", "Choices that a request asks for.", CHOICE_BUCKETS
        )

    def observe_requests(self, read_counts: Callable[[], tuple[int, int]]) -> None:
        """Read the numbers of running and waiting requests whenever metrics are scraped."""
        self._running.set_function(lambda: read_counts()[0])
        self._waiting.set_function(lambda: read_counts()[1])
        self._waiting_for["capacity"].set_function(lambda: read_counts()[1])

    def observe_held(self, read_count: Callable[[], int]) -> None:
        """Read the number of requests that wait for functions whenever metrics are scraped."""
        self._waiting_for["deferred"].set_function(read_count)

    def _add_states(self, registry: CollectorRegistry) -> None:
        """Add what requests wait for, and that the engine is awake, which vLLM's may not be."""
        waiting = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Waiting requests: for capacity, or deferred until functions are active.",
            ["model_name", "reason"],
            registry=registry,
        )
        self._waiting_for = {
            reason: waiting.labels(self._model_name, reason) for reason in ("capacity", "deferred")
        }
        state = Gauge(
            "vllm:engine_sleep_state",
            "Whether the engine is awake: always, while it runs.",
            ["model_name", "sleep_state"],
            registry=registry,
        )
        state.labels(self._model_name, "awake").set(1)

    def _add_server_gauges(self, registry: CollectorRegistry) -> None:
        """Add what production-stack's router says of each server, here of this one."""
        rate = Gauge(
            "vllm:current_qps",
            "Requests per second in the last minute.",
            ["server"],
            registry=registry,
        )
        rate.labels(self._model_name).set_function(lambda: self._rate.per_second(time.monotonic()))
        self._healthy = Gauge(
            "vllm:healthy_pods_total",
            "Whether this server serves requests.",
            ["server"],
            registry=registry,
        ).labels(self._model_name)

    def observe_health(self, read_is_ready: Callable[[], bool]) -> None:
        """Read whether requests are served whenever metrics are scraped."""
        self._healthy.set_function(lambda: float(read_is_ready()))

    def record_request(self, n_choices: int, now_s: float) -> None:
        """Record a request that is queued."""
        self._rate.add(now_s)
        self._choices.observe(n_choices)

    def record_step(self, n_tokens: int, n_first_tokens: int) -> None:
        """Record a step: the tokens it has computed, and answers whose first token it generates.

        As vLLM's, the histogram counts tokens of prompts and generated ones, so that the step that
        ends a prompt counts the answer's first token too.
        """
        self.n_computed_tokens += n_tokens
        self._step_tokens.observe(n_tokens + n_first_tokens)

    def record_prompt(self, n_tokens: int, n_cached: int) -> None:
        """Record a prompt that has been computed, and what the prefix cache had of it."""
        self.prompt_tokens.inc(n_tokens)
        for queries, hits in zip(self._prefix_queries, self._prefix_hits, strict=True):
            queries.inc(n_tokens)
            hits.inc(n_cached)
        self._cached_tokens.inc(n_cached)
        self._cached_source.inc(n_cached)
        self._computed_source.inc(n_tokens - n_cached)

    def observe_kv_cache(self, read_usage: Callable[[], float]) -> None:
        """Read the taken part of the KV cache, from 0 to 1, whenever metrics are scraped."""
        self._kv_cache_usage.set_function(read_usage)

    def set_cache_config(self, *, n_pages: int, page_tokens: int, max_model_len: int) -> None:
        """Set the size of the KV cache.

        Args:
            n_pages: its pages, vLLM's blocks.
            page_tokens: tokens of each.
            max_model_len: tokens of the longest request, of which it holds so many at a time.
        """
        n_tokens = n_pages * page_tokens
        max_concurrency = n_tokens / max_model_len
        self._cache_config.clear()
        self._cache_config.labels(
            self._model_name, page_tokens, n_pages, n_tokens, max_concurrency
        ).set(1)

    def record_first_token(self, seconds: float, *, trace_id: str) -> None:
        """Record a request's time to its first token, with its trace; empty for none."""
        self._time_to_first_token_s.observe(seconds, _exemplar(trace_id))

    def record_sequence(
        self, times: SequenceTimes, counts: SequenceCounts, *, max_tokens: int, trace_id: str
    ) -> None:
        """Record a sequence that has ended.

        Args:
            times: when things happened to it.
            counts: its tokens.
            max_tokens: the most that it might have generated.
            trace_id: its trace; empty for none.
        """
        durations_s = {
            "e2e_request_latency": times.last_token_s - times.arrival_s,
            "request_queue_time": times.queue_s,
            "request_prefill_time": times.prefill_s,
            "request_decode_time": times.decode_s,
            "request_inference_time": times.prefill_s + times.decode_s,
        }
        exemplar = _exemplar(trace_id)
        for name, seconds in durations_s.items():
            self._durations_s[name].observe(seconds, exemplar)
        if counts.generated > 1:
            self._time_per_output_token_s.observe(times.decode_s / (counts.generated - 1), exemplar)
        tokens = {
            "request_prompt_tokens": counts.prompt,
            "request_generation_tokens": counts.generated,
            "request_max_num_generation_tokens": counts.generated,
            "request_params_max_tokens": max_tokens,
        }
        for name, n_tokens in tokens.items():
            self._tokens[name].observe(n_tokens)
        self._request_preemptions.observe(counts.preempted)

    def record_finished(self, reason: str) -> None:
        """Count a finished request by its reason: stop, length, abort or error."""
        self._success.labels(self._model_name, reason).inc()
