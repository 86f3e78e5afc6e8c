from faasmoe_contracts.control_messages import FunctionLoad
from faasmoe_router.control.load_reporter import (
    ForwardPassLoads,
    LoadAverager,
    busy_functions,
    merge_readings,
)
from faasmoe_router.dispatch.load import LoadMeter, LoadTotals


def test_concurrency_is_the_time_average_of_the_calls_in_flight() -> None:
    load, averager = LoadMeter(), LoadAverager(0.0)
    # In the first second: one call for 0.4 s, a second one from 0.2 s on. 0.4 + 0.8 = 1.2.
    load.record_start("f", 0.0, rows=3)
    load.record_start("f", 0.2, rows=5)
    load.record_end("f", 0.4)
    assert averager.average(1.0, load.snapshot(1.0)) == (1.0, {"f": FunctionLoad(1.2, 2, 8)})
    # In the next two seconds: the call lasts for another 0.5 s. 0.5 / 2 = 0.25.
    load.record_end("f", 1.5)
    assert averager.average(3.0, load.snapshot(3.0)) == (2.0, {"f": FunctionLoad(0.25, 0, 0)})
    # And then nothing.
    assert averager.average(4.0, load.snapshot(4.0)) == (1.0, {"f": FunctionLoad(0.0, 0, 0)})


def test_a_queued_call_counts_until_its_function_responds() -> None:
    activator, calls, averager = LoadMeter(), LoadMeter(), LoadAverager(10.0)
    activator.record_queued("f", 10.0)
    activator.record_end("f", 10.75)
    calls.record_start("f", 10.75, rows=2)
    calls.record_end("f", 11.0)
    _, loads = averager.average(
        11.0, merge_readings([activator.snapshot(11.0), calls.snapshot(11.0)])
    )
    assert loads == {"f": FunctionLoad(1.0, 1, 2)}


def test_readings_of_meters_are_added() -> None:
    total = merge_readings(
        [{"f": LoadTotals(1.0, 2, 3), "g": LoadTotals(1.0, 1, 1)}, {"f": LoadTotals(0.5, 1, 1)}]
    )
    assert total == {"f": LoadTotals(1.5, 3, 4), "g": LoadTotals(1.0, 1, 1)}


def test_rounding_never_makes_a_load_negative() -> None:
    _, loads = LoadAverager(0.0).average(1.0, {"f": LoadTotals(-1e-9, 0, 0)})
    assert loads["f"].concurrency == 0.0
    assert loads["f"].is_idle


def test_two_readings_at_the_same_time_do_not_divide_by_zero() -> None:
    interval_s, _ = LoadAverager(5.0).average(5.0, {})
    assert interval_s > 0


def test_a_report_contains_known_functions_with_load_only() -> None:
    loads = {
        "busy": FunctionLoad(0.5, 2, 9),
        "queued": FunctionLoad(1.0, 0, 0),
        "idle": FunctionLoad(0.0, 0, 0),
        "removed": FunctionLoad(1.0, 1, 1),
    }
    assert busy_functions(loads, known={"busy", "idle", "queued"}) == {
        "busy": FunctionLoad(0.5, 2, 9),
        "queued": FunctionLoad(1.0, 0, 0),
    }


CALLED, IDLE = FunctionLoad(0.2, 3, 7), FunctionLoad(0.0, 0, 0)
CARRIED_OVER = FunctionLoad(0.2, 0, 0)


def test_a_load_is_carried_over_until_a_whole_pass_has_not_called_the_function() -> None:
    pass_loads = ForwardPassLoads()
    first = pass_loads.carry_over({"f": CALLED, "g": IDLE}, n_passes_started=1, is_busy=True)
    assert first == {"f": CALLED, "g": IDLE}
    second = pass_loads.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=0, is_busy=True)
    assert second == {"f": CARRIED_OVER, "g": CALLED}
    # The pass has ended and another has started: it called both functions.
    third = pass_loads.carry_over({"f": IDLE, "g": IDLE}, n_passes_started=1, is_busy=True)
    assert third == {"f": CARRIED_OVER, "g": CARRIED_OVER}
    pass_loads.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=1, is_busy=True)
    # That pass called only g, and so did the next one.
    assert (
        pass_loads.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=1, is_busy=True)["f"]
        == IDLE
    )


def test_after_short_passes_a_function_is_idle_immediately() -> None:
    pass_loads = ForwardPassLoads()
    pass_loads.carry_over({"f": CALLED, "g": CALLED}, n_passes_started=20, is_busy=True)
    assert (
        pass_loads.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=20, is_busy=True)["f"]
        == IDLE
    )


def test_a_function_queued_before_a_pass_is_not_idle_until_the_pass_reaches_it() -> None:
    pass_loads = ForwardPassLoads()
    queued = FunctionLoad(0.1, 0, 0)
    assert pass_loads.carry_over({"f": queued}, n_passes_started=0, is_busy=False) == {"f": queued}
    for _ in range(9):  # the first pass of a process: seconds, on a busy machine
        assert pass_loads.carry_over({"f": IDLE}, n_passes_started=0, is_busy=True) == {"f": queued}


def test_nothing_is_carried_over_without_requests() -> None:
    pass_loads = ForwardPassLoads()
    pass_loads.carry_over({"f": CALLED}, n_passes_started=1, is_busy=True)
    assert pass_loads.carry_over({"f": IDLE}, n_passes_started=0, is_busy=False) == {"f": IDLE}
    assert pass_loads.carry_over({"f": IDLE}, n_passes_started=0, is_busy=True) == {"f": IDLE}
