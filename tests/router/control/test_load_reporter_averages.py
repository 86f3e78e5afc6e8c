from typing import Any

from faasmoe_router.control.load_reporter import (
    ForwardPassLoads,
    FunctionLoad,
    LoadAverager,
    load_report_body,
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
    # In the next two: it lasts for another 0.5 s. 0.5 / 2 = 0.25.
    load.record_end("f", 1.5)
    assert averager.average(3.0, load.snapshot(3.0)) == (2.0, {"f": FunctionLoad(0.25, 0, 0)})
    # And then nothing.
    assert averager.average(4.0, load.snapshot(4.0)) == (1.0, {"f": FunctionLoad(0.0, 0, 0)})


def test_a_held_call_counts_until_its_function_answers() -> None:
    gate, calls, averager = LoadMeter(), LoadMeter(), LoadAverager(10.0)
    gate.record_queued("f", 10.0)
    gate.record_end("f", 10.75)
    calls.record_start("f", 10.75, rows=2)
    calls.record_end("f", 11.0)
    _, loads = averager.average(11.0, merge_readings([gate.snapshot(11.0), calls.snapshot(11.0)]))
    assert loads == {"f": FunctionLoad(1.0, 1, 2)}


def test_meters_add_up() -> None:
    total = merge_readings(
        [{"f": LoadTotals(1.0, 2, 3), "g": LoadTotals(1.0, 1, 1)}, {"f": LoadTotals(0.5, 1, 1)}]
    )
    assert total == {"f": LoadTotals(1.5, 3, 4), "g": LoadTotals(1.0, 1, 1)}


def test_rounding_never_makes_a_load_negative() -> None:
    _, loads = LoadAverager(0.0).average(1.0, {"f": LoadTotals(-1e-9, 0, 0)})
    assert loads["f"].concurrency == 0.0
    assert loads["f"].is_idle


def test_two_readings_at_once_make_no_division_by_zero() -> None:
    interval_s, _ = LoadAverager(5.0).average(5.0, {})
    assert interval_s > 0


def test_a_report_tells_of_load_and_nothing_of_what_is_idle_or_left_the_table() -> None:
    loads = {
        "busy": FunctionLoad(0.5, 2, 9),
        "held": FunctionLoad(1.0, 0, 0),
        "idle": FunctionLoad(0.0, 0, 0),
        "left": FunctionLoad(1.0, 1, 1),
    }
    body = load_report_body(
        loads,
        router_name="r",
        sent_at_s=100.0,
        interval_s=1.0,
        known={"busy", "idle", "held"},
        n_queued=3,
        n_local=4,
    )
    assert body == {
        "router": "r",
        "sent_at_s": 100.0,
        "interval_s": 1.0,
        "functions": {
            "busy": {"concurrency": 0.5, "calls": 2, "rows": 9},
            "held": {"concurrency": 1.0, "calls": 0, "rows": 0},
        },
        "held": 3,
        "local": 4,
    }


def test_a_report_tells_how_many_keys_each_tenant_has_where_there_are_tenants() -> None:
    def body(tenants: dict[str, int] | None) -> dict[str, Any]:
        return load_report_body(
            {},
            router_name="r",
            sent_at_s=0.0,
            interval_s=1.0,
            known=(),
            n_queued=0,
            n_local=0,
            tenant_keys=tenants,
        )

    assert "tenants" not in body(None)
    assert body({"acme": 2, "beta": 0})["tenants"] == {"acme": 2, "beta": 0}


CALLED, IDLE = FunctionLoad(0.2, 3, 7), FunctionLoad(0.0, 0, 0)
STANDS = FunctionLoad(0.2, 0, 0)


def test_the_load_of_a_function_stands_until_a_whole_pass_has_left_it_out() -> None:
    memory = ForwardPassLoads()
    first = memory.carry_over({"f": CALLED, "g": IDLE}, n_passes_started=1, is_busy=True)
    assert first == {"f": CALLED, "g": IDLE}
    second = memory.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=0, is_busy=True)
    assert second == {"f": STANDS, "g": CALLED}
    # The pass has ended and another has begun: both functions were in it.
    third = memory.carry_over({"f": IDLE, "g": IDLE}, n_passes_started=1, is_busy=True)
    assert third == {"f": STANDS, "g": STANDS}
    memory.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=1, is_busy=True)
    # That one has called g only, and so has the next.
    assert (
        memory.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=1, is_busy=True)["f"] == IDLE
    )


def test_short_passes_say_at_once_that_a_function_is_idle() -> None:
    memory = ForwardPassLoads()
    memory.carry_over({"f": CALLED, "g": CALLED}, n_passes_started=20, is_busy=True)
    assert (
        memory.carry_over({"f": IDLE, "g": CALLED}, n_passes_started=20, is_busy=True)["f"] == IDLE
    )


def test_what_was_waited_for_before_a_pass_is_not_idle_while_the_pass_comes_to_it() -> None:
    memory = ForwardPassLoads()
    held = FunctionLoad(0.1, 0, 0)
    assert memory.carry_over({"f": held}, n_passes_started=0, is_busy=False) == {"f": held}
    for _ in range(9):  # the first pass of a process: seconds, on a busy machine
        assert memory.carry_over({"f": IDLE}, n_passes_started=0, is_busy=True) == {"f": held}


def test_nothing_stands_when_no_request_is_computed() -> None:
    memory = ForwardPassLoads()
    memory.carry_over({"f": CALLED}, n_passes_started=1, is_busy=True)
    assert memory.carry_over({"f": IDLE}, n_passes_started=0, is_busy=False) == {"f": IDLE}
    assert memory.carry_over({"f": IDLE}, n_passes_started=0, is_busy=True) == {"f": IDLE}
