"""The calibration file, its fit, and the comparison with a real run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from benchmarks.simulation import calibrate, validate
from benchmarks.simulation.calibrate import Timing
from benchmarks.simulation.calibration import DEFAULT_FILE, Calibration
from benchmarks.simulation.errors import SimulationError
from benchmarks.simulation.geometry import load_geometry
from benchmarks.simulation.step_time import StepTime

GEOMETRY = load_geometry("qwen3-235b", quantization="none")


def test_the_default_calibration_is_valid_and_names_its_machine() -> None:
    calibration = Calibration.load(DEFAULT_FILE)
    assert calibration.machine is not None
    assert calibration.machine["cpu"]
    assert calibration.machine["date"]


def test_a_saved_calibration_is_read_back(tmp_path: Path) -> None:
    calibration = Calibration.load(DEFAULT_FILE)
    calibration.save(tmp_path / "new" / "calibration.json")
    assert Calibration.load(tmp_path / "new" / "calibration.json") == calibration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"read_bytes_per_s": 0}, "read_bytes_per_s: got 0, expected.*above 0", id="0"),
        pytest.param({"attach_s": -1}, "attach_s: got -1, expected a number of 0", id="negative"),
        pytest.param({"step_s": "1"}, "step_s: got '1'", id="text"),
        pytest.param({"speed": 1}, "--calibration: got .*speed.*expected the fields", id="unknown"),
    ],
)
def test_an_invalid_calibration_names_the_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(json.loads(DEFAULT_FILE.read_text()) | change))
    with pytest.raises(SimulationError, match=message):
        Calibration.load(file)


def test_faster_nodes_scale_rates_only() -> None:
    calibration = Calibration.load(DEFAULT_FILE)
    fast = calibration.scaled(speed=3, weights_bytes_per_s=None)
    assert fast.read_bytes_per_s == 3 * calibration.read_bytes_per_s
    assert fast.flops_per_s == 3 * calibration.flops_per_s
    assert (fast.step_s, fast.weights_bytes_per_s) == (
        calibration.step_s,
        calibration.weights_bytes_per_s,
    )


def test_the_fit_finds_the_costs_that_times_were_made_of() -> None:
    costs = Calibration(0.05, 0, 2e10, 5e11, 0.03, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    steps = StepTime(GEOMETRY, costs, call_s=0.0)
    timings = [Timing(rows, steps.step_s(rows), is_request=False) for rows in (1, 4, 8)]
    timings += [Timing(r, steps.step_s(r) + costs.request_s, is_request=True) for r in (16, 256)]
    fixed_s, byte_s, flop_s, request_s = calibrate.fit(GEOMETRY, timings)
    assert fixed_s == pytest.approx(0.05, rel=0.01)
    assert 1 / byte_s == pytest.approx(2e10, rel=0.01)
    assert 1 / flop_s == pytest.approx(5e11, rel=0.01)
    assert request_s == pytest.approx(0.03, rel=0.01)


def test_the_fit_never_has_a_negative_cost() -> None:
    timings = [Timing(rows, 1.0 / rows, is_request=False) for rows in (1, 8, 64)]
    assert min(calibrate.fit(GEOMETRY, timings)) >= 0


def test_the_validation_has_bursts_and_pauses_that_reach_zero() -> None:
    traffic = validate.bursty_traffic(600, seed=1)
    times = [request.arrival_s for request in traffic.requests]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert traffic == validate.bursty_traffic(600, seed=1)
    assert times[-1] < 600
    assert sum(gap > calibrate.WINDOW_S + 2 for gap in gaps) >= 5
    assert sum(gap < 2 for gap in gaps) > len(gaps) / 3


def test_errors_are_relative_to_what_was_measured() -> None:
    errors = validate.compare(
        {"served": 3, "gb_seconds": 10.0, "cold_start_p50_s": None, "ttft_p50_s": 0.5},
        {"served": 3, "gb_seconds": 9.0, "cold_start_p50_s": 1.0, "ttft_p50_s": 0.6},
    )
    assert errors == {"gb_seconds": pytest.approx(0.1), "ttft_p50_s": pytest.approx(0.2)}
