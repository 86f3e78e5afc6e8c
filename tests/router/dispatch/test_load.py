"""The load meter's concurrency integral and counters."""

from faasmoe_router.dispatch.load import LoadMeter, LoadTotals


def totals_of(load: LoadMeter, now_s: float) -> LoadTotals:
    """Return the totals of function `f`, without float noise."""
    totals = load.snapshot(now_s)["f"]
    return totals._replace(in_flight_s=round(totals.in_flight_s, 9))


def test_function_that_was_never_called_is_not_in_the_snapshot() -> None:
    assert LoadMeter().snapshot(1.0) == {}


def test_call_counts_as_long_as_it_is_in_flight() -> None:
    load = LoadMeter()
    load.record_start("f", 100.0, rows=7)
    assert totals_of(load, 100.25) == LoadTotals(0.25, 1, 7)
    load.record_end("f", 100.5)
    assert totals_of(load, 200.0) == LoadTotals(0.5, 1, 7)


def test_overlapping_calls_add_up() -> None:
    load = LoadMeter()
    load.record_start("f", 10.0, rows=1)
    load.record_start("f", 10.2, rows=2)
    load.record_end("f", 10.3)
    # One from 10.0 to 10.3 or 10.4, the other from 10.2: which one ended does not matter.
    assert totals_of(load, 10.4) == LoadTotals(0.5, 2, 3)


def test_queued_request_is_in_flight_but_no_call() -> None:
    load = LoadMeter()
    load.record_queued("f", 0.0)
    load.record_end("f", 2.0)
    assert totals_of(load, 5.0) == LoadTotals(2.0, 0, 0)


def test_functions_are_counted_separately() -> None:
    load = LoadMeter()
    load.record_start("f", 0.0, rows=1)
    load.record_start("g", 1.0, rows=1)
    totals = load.snapshot(3.0)
    assert (totals["f"].in_flight_s, totals["g"].in_flight_s) == (3.0, 2.0)


def test_retain_forgets_other_functions_once_they_are_idle() -> None:
    load = LoadMeter()
    load.record_start("gone", 0.0, rows=1)
    load.record_start("idle", 0.0, rows=1)
    load.record_end("idle", 1.0)
    load.record_start("known", 0.0, rows=1)
    load.record_end("known", 1.0)
    load.retain({"known"})
    assert set(load.snapshot(1.0)) == {"gone", "known"}
    load.record_end("gone", 2.0)
    load.retain({"known"})
    assert set(load.snapshot(1.0)) == {"known"}
