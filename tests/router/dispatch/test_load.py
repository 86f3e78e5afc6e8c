from faasmoe_router.dispatch.load import LoadMeter, LoadTotals


def read(load: LoadMeter, now_s: float) -> LoadTotals:
    """What is told of `f`, without float noise."""
    reading = load.snapshot(now_s)["f"]
    return reading._replace(in_flight_s=round(reading.in_flight_s, 9))


def test_a_function_never_called_has_no_reading() -> None:
    assert LoadMeter().snapshot(1.0) == {}


def test_a_call_counts_for_as_long_as_it_is_in_flight() -> None:
    load = LoadMeter()
    load.record_start("f", 100.0, rows=7)
    assert read(load, 100.25) == LoadTotals(0.25, 1, 7)
    load.record_end("f", 100.5)
    assert read(load, 200.0) == LoadTotals(0.5, 1, 7)


def test_calls_that_overlap_add_up() -> None:
    load = LoadMeter()
    load.record_start("f", 10.0, rows=1)
    load.record_start("f", 10.2, rows=2)
    load.record_end("f", 10.3)
    # One from 10.0 to 10.3 or 10.4, the other from 10.2: which one ended does not matter.
    assert read(load, 10.4) == LoadTotals(0.5, 2, 3)


def test_a_hold_is_in_flight_and_no_call() -> None:
    load = LoadMeter()
    load.record_queued("f", 0.0)
    load.record_end("f", 2.0)
    assert read(load, 5.0) == LoadTotals(2.0, 0, 0)


def test_functions_do_not_mix() -> None:
    load = LoadMeter()
    load.record_start("f", 0.0, rows=1)
    load.record_start("g", 1.0, rows=1)
    readings = load.snapshot(3.0)
    assert (readings["f"].in_flight_s, readings["g"].in_flight_s) == (3.0, 2.0)


def test_what_left_the_table_is_forgotten_once_it_is_idle() -> None:
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
