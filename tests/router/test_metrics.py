from prometheus_client import Counter, generate_latest

from faasmoe_router.metrics import EngineMetrics, new_registry


def test_two_registries_do_not_meet() -> None:
    for _ in range(2):
        EngineMetrics(new_registry(), "m")


def test_others_register_on_the_same_registry() -> None:
    registry = new_registry()
    EngineMetrics(registry, "m")
    Counter("others", "Of another part.", registry=registry).inc()
    assert b"others_total 1.0" in generate_latest(registry)


def test_requests_are_counted_when_they_are_read() -> None:
    registry = new_registry()
    counts = [(1, 2)]
    EngineMetrics(registry, "m").observe_requests(lambda: counts[0])
    counts[0] = (3, 4)
    text = generate_latest(registry).decode()
    assert 'vllm:num_requests_running{model_name="m"} 3.0' in text
    assert 'vllm:num_requests_waiting{model_name="m"} 4.0' in text
