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


def test_adds_a_metric_up_over_its_labels() -> None:
    assert metric_total(TEXT, "calls_total") == 5


def test_a_counter_that_has_counted_nothing_is_0() -> None:
    assert parse_counters(TEXT, {"idle": "idle_total"}) == {"idle": 0}


def test_a_metric_that_is_not_there_is_no_0() -> None:
    with pytest.raises(ValueError, match="got none that is called gone_total"):
        parse_counters(TEXT, {"gone": "gone_total"})


def test_adds_processes_up_and_takes_differences() -> None:
    after = sum_counters([{"calls": 3.0}, {"calls": 4.0, "activations": 1.0}])
    assert after == {"calls": 7.0, "activations": 1.0}
    assert counter_deltas({"calls": 5.0}, after) == {"calls": 2.0, "activations": 1.0}
