from faasmoe_router.control.reports import (
    FunctionLoad,
    LoadAverager,
    PassMemory,
    merge,
    report_body,
)
from faasmoe_router.dispatch.load import LoadMeter, Reading


def test_concurrency_is_the_time_average_of_the_calls_in_flight() -> None:
    load, averager = LoadMeter(), LoadAverager(0.0)
    # In the first second: one call for 0.4 s, a second one from 0.2 s on. 0.4 + 0.8 = 1.2.
    load.begin("f", 0.0, rows=3)
    load.begin("f", 0.2, rows=5)
    load.end("f", 0.4)
    assert averager.take(1.0, load.read(1.0)) == (1.0, {"f": FunctionLoad(1.2, 2, 8)})
    # In the next two: it lasts for another 0.5 s. 0.5 / 2 = 0.25.
    load.end("f", 1.5)
    assert averager.take(3.0, load.read(3.0)) == (2.0, {"f": FunctionLoad(0.25, 0, 0)})
    # And then nothing.
    assert averager.take(4.0, load.read(4.0)) == (1.0, {"f": FunctionLoad(0.0, 0, 0)})


def test_a_held_call_counts_until_its_function_answers() -> None:
    gate, calls, averager = LoadMeter(), LoadMeter(), LoadAverager(10.0)
    gate.hold("f", 10.0)
    gate.end("f", 10.75)
    calls.begin("f", 10.75, rows=2)
    calls.end("f", 11.0)
    _, loads = averager.take(11.0, merge([gate.read(11.0), calls.read(11.0)]))
    assert loads == {"f": FunctionLoad(1.0, 1, 2)}


def test_meters_add_up() -> None:
    total = merge([{"f": Reading(1.0, 2, 3), "g": Reading(1.0, 1, 1)}, {"f": Reading(0.5, 1, 1)}])
    assert total == {"f": Reading(1.5, 3, 4), "g": Reading(1.0, 1, 1)}


def test_rounding_never_makes_a_load_negative() -> None:
    _, loads = LoadAverager(0.0).take(1.0, {"f": Reading(-1e-9, 0, 0)})
    assert loads["f"].concurrency == 0.0
    assert loads["f"].is_idle


def test_two_readings_at_once_make_no_division_by_zero() -> None:
    interval_s, _ = LoadAverager(5.0).take(5.0, {})
    assert interval_s > 0


def test_a_report_tells_of_load_and_nothing_of_what_is_idle_or_left_the_table() -> None:
    loads = {
        "busy": FunctionLoad(0.5, 2, 9),
        "held": FunctionLoad(1.0, 0, 0),
        "idle": FunctionLoad(0.0, 0, 0),
        "left": FunctionLoad(1.0, 1, 1),
    }
    body = report_body(
        loads,
        router="r",
        sent_at_s=100.0,
        interval_s=1.0,
        known={"busy", "idle", "held"},
        held=3,
        local=4,
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


CALLED, IDLE = FunctionLoad(0.2, 3, 7), FunctionLoad(0.0, 0, 0)
STANDS = FunctionLoad(0.2, 0, 0)


def test_the_load_of_a_function_stands_until_a_whole_pass_has_left_it_out() -> None:
    memory = PassMemory()
    first = memory.fill({"f": CALLED, "g": IDLE}, n_begun=1, is_busy=True)
    assert first == {"f": CALLED, "g": IDLE}
    second = memory.fill({"f": IDLE, "g": CALLED}, n_begun=0, is_busy=True)
    assert second == {"f": STANDS, "g": CALLED}
    # The pass has ended and another has begun: both functions were in it.
    third = memory.fill({"f": IDLE, "g": IDLE}, n_begun=1, is_busy=True)
    assert third == {"f": STANDS, "g": STANDS}
    memory.fill({"f": IDLE, "g": CALLED}, n_begun=1, is_busy=True)
    # That one has called g only, and so has the next.
    assert memory.fill({"f": IDLE, "g": CALLED}, n_begun=1, is_busy=True)["f"] == IDLE


def test_short_passes_say_at_once_that_a_function_is_idle() -> None:
    memory = PassMemory()
    memory.fill({"f": CALLED, "g": CALLED}, n_begun=20, is_busy=True)
    assert memory.fill({"f": IDLE, "g": CALLED}, n_begun=20, is_busy=True)["f"] == IDLE


def test_what_was_waited_for_before_a_pass_is_not_idle_while_the_pass_comes_to_it() -> None:
    memory = PassMemory()
    held = FunctionLoad(0.1, 0, 0)
    assert memory.fill({"f": held}, n_begun=0, is_busy=False) == {"f": held}
    for _ in range(9):  # the first pass of a process: seconds, on a busy machine
        assert memory.fill({"f": IDLE}, n_begun=0, is_busy=True) == {"f": held}


def test_nothing_stands_when_no_request_is_computed() -> None:
    memory = PassMemory()
    memory.fill({"f": CALLED}, n_begun=1, is_busy=True)
    assert memory.fill({"f": IDLE}, n_begun=0, is_busy=False) == {"f": IDLE}
    assert memory.fill({"f": IDLE}, n_begun=0, is_busy=True) == {"f": IDLE}
