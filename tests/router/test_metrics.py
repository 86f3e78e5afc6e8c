from prometheus_client import Counter, generate_latest

from faasmoe_router.metrics import EngineMetrics, new_registry


def test_registries_are_independent() -> None:
    for _ in range(2):
        EngineMetrics(new_registry(), "m")


def test_other_collectors_share_the_registry() -> None:
    registry = new_registry()
    EngineMetrics(registry, "m")
    Counter("others", "Metric of another module.", registry=registry).inc()
    assert b"others_total 1.0" in generate_latest(registry)


def test_request_gauges_are_read_at_scrape_time() -> None:
    registry = new_registry()
    counts = [(1, 2)]
    EngineMetrics(registry, "m").observe_requests(lambda: counts[0])
    counts[0] = (3, 4)
    text = generate_latest(registry).decode()
    assert 'vllm:num_requests_running{model_name="m"} 3.0' in text
    assert 'vllm:num_requests_waiting{model_name="m"} 4.0' in text


def test_kv_cache_has_the_metrics_that_inference_gateways_demand() -> None:
    registry = new_registry()
    metrics = EngineMetrics(registry, "m")
    metrics.observe_kv_cache(lambda: 0.25)
    metrics.set_cache_config(n_pages=8, page_tokens=32, max_model_len=128)
    metrics.set_cache_config(n_pages=16, page_tokens=32, max_model_len=128)  # of the next batcher
    text = generate_latest(registry).decode()
    assert 'vllm:kv_cache_usage_perc{model_name="m"} 0.25' in text
    [line] = [x for x in text.splitlines() if x.startswith("vllm:cache_config_info{")]
    assert 'block_size="32"' in line
    assert 'num_gpu_blocks="16"' in line
    assert 'kv_cache_size_tokens="512"' in line
    assert 'kv_cache_max_concurrency="4.0"' in line
    assert line.endswith(" 1.0")
