from pathlib import Path

from faasmoe_contracts.start_phases import StartPhases, parse_start_phases, process_age_s


def test_phases_are_described_and_parsed_in_order() -> None:
    times_s = iter([10.0, 11.5, 11.75])
    phases = StartPhases(age_s=0.02, clock=lambda: next(times_s))
    phases.end("imports")
    phases.end("model load")
    line = phases.describe()
    assert line == "start took 1.77 s: exec 0.02 s, imports 1.50 s, model load 0.25 s"
    parsed = parse_start_phases(f"[router] 2026-11-29 INFO {line}")
    assert parsed is not None
    assert list(parsed.items()) == [("exec", 0.02), ("imports", 1.5), ("model load", 0.25)]


def test_first_phase_has_a_name_of_its_own() -> None:
    phases = StartPhases("imports", age_s=0.5, clock=lambda: 1.0)
    assert phases.describe() == "start took 0.50 s: imports 0.50 s"


def test_other_lines_have_no_phases() -> None:
    assert parse_start_phases("[router] demo is loaded on cpu") is None


def test_age_of_a_new_process_is_that_since_its_start_time(tmp_path: Path) -> None:
    assert 0 <= process_age_s() < 3600
    stat = tmp_path / "stat"
    stat.write_text("1 (a) b) S " + " ".join(["0"] * 18) + " 100 0")  # one second after boot
    assert process_age_s(proc=stat) > process_age_s()
