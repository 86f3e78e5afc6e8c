"""Where the time of a swap goes, by the launcher's lines."""

from __future__ import annotations

import threading
from pathlib import Path

from benchmarks.swaps import Answer, RouterTimeline, followed_log

LINES = (
    (2.0, "faasmoe: the router of m1 starts, 1.00 s after it was asked for"),
    (2.5, "faasmoe: the router of m1 takes requests, after 0.50 s"),
    (2.6, "[m1-router] something else"),
    (3.0, "faasmoe: the router of m2 has ended in 0.20 s: others need its memory"),
    (3.0, "faasmoe: the router of m3 has ended in 0.90 s: no requests"),
)


def timeline() -> RouterTimeline:
    found = RouterTimeline()
    for now_s, line in LINES:
        found.add_line(line, now_s)
    return found


def test_time_of_a_swap_is_divided_by_its_routers_lines() -> None:
    assert timeline().parts_of(Answer("m1", 1.0, 4.0)) == (1.0, 0.5, 1.5)
    assert timeline().parts_of(Answer("m1", 2.25, 4.0)) == (0.0, 0.25, 1.5)  # it was starting
    assert timeline().parts_of(Answer("m1", 3.0, 4.0)) == (0.0, 0.0, 1.0)  # it was there
    assert timeline().parts_of(Answer("m2", 1.0, 4.0)) == (0.0, 0.0, 3.0)


def test_figures_are_of_each_part() -> None:
    figures = timeline().figures([Answer("m1", 1.0, 4.0)])
    assert figures == {
        **{f"room_p{rank}_s": 1.0 for rank in (50, 99)},
        **{f"start_p{rank}_s": 0.5 for rank in (50, 99)},
        **{f"rest_p{rank}_s": 1.5 for rank in (50, 99)},
        **{f"end_p{rank}_s": 0.2 for rank in (50, 99)},
    }
    assert RouterTimeline().figures([]) == {}


def test_lines_of_a_log_are_followed_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    log.write_text(f"{LINES[3][1]}\n")
    with followed_log(log) as found:
        started = threading.Event()
        with log.open("a") as file:
            while not found.ends_s:  # until the log is followed
                file.write(f"{LINES[3][1]}\n")
                file.flush()
                started.wait(0.05)
    assert set(found.ends_s) == {0.2}
