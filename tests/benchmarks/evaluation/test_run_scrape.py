import pytest
from benchmarks.evaluation.run import counter_deltas, metric_total, parse_counters, sum_counters

TEXT = """\
# HELP calls_total Calls.
# TYPE calls_total counter
calls_total{outcome="ok"} 3.0
calls_total{outcome="failed"} 2.0
calls_totally_different_total 9.0
# TYPE idle counter
"""


def test_sums_metric_over_labels() -> None:
    assert metric_total(TEXT, "calls_total") == 5


def test_counter_without_samples_is_zero() -> None:
    assert parse_counters(TEXT, {"idle": "idle_total"}) == {"idle": 0}


def test_unknown_metric_raises() -> None:
    with pytest.raises(ValueError, match="got no metric unknown_total"):
        parse_counters(TEXT, {"unknown": "unknown_total"})


def test_sums_over_processes_and_subtracts() -> None:
    after = sum_counters([{"calls": 3.0}, {"calls": 4.0, "activations": 1.0}])
    assert after == {"calls": 7.0, "activations": 1.0}
    assert counter_deltas({"calls": 5.0}, after) == {"calls": 2.0, "activations": 1.0}
