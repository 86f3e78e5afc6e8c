"""Where the time of a swap goes: what the launcher prints about routers, beside the requests.

A swap is a request that waits for a router of its model. Its time is divided into waiting for room
(for others to end, and for its turn to start), the router's start until it takes requests, and the
rest: functions, queue in the engine, the first token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.polling import polling
from benchmarks.report import percentile

POLL_S = 0.02
STARTS = re.compile(r"faasmoe: the router of (\S+) starts, [\d.]+ s after")
READY = re.compile(r"faasmoe: the router of (\S+) takes requests")
ENDED = re.compile(r"faasmoe: the router of (\S+) has ended in ([\d.]+) s: others need its memory")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answered request.

    Attributes:
        model: its model.
        sent_s: when it was sent, on the monotonic clock.
        first_s: when its first token came.
    """

    model: str
    sent_s: float
    first_s: float

    @property
    def waited_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.sent_s


class RouterTimeline:
    """When routers started, took requests and made room, by the lines of a launcher's log.

    Attributes:
        ends_s: seconds that routers took to end.
    """

    def __init__(self) -> None:
        self.ends_s: list[float] = []
        self._starts: dict[str, list[float]] = {}
        self._ready: dict[str, list[float]] = {}

    def add_line(self, line: str, now_s: float) -> None:
        """Take a line that was written at a time on the monotonic clock."""
        if found := STARTS.search(line):
            self._starts.setdefault(found[1], []).append(now_s)
        elif found := READY.search(line):
            self._ready.setdefault(found[1], []).append(now_s)
        elif found := ENDED.search(line):
            self.ends_s.append(float(found[2]))

    def parts_of(self, answer: Answer) -> tuple[float, float, float]:
        """Return the seconds of an answer's wait: for room, for the start, and the rest."""
        ready = [s for s in self._ready.get(answer.model, ()) if answer.sent_s < s < answer.first_s]
        if not ready:
            return 0.0, 0.0, answer.waited_s
        starts = [s for s in self._starts.get(answer.model, ()) if s < ready[-1]]
        start_s = max(answer.sent_s, starts[-1]) if starts else answer.sent_s
        return start_s - answer.sent_s, ready[-1] - start_s, answer.first_s - ready[-1]

    def figures(self, swaps: Sequence[Answer]) -> dict[str, float]:
        """Return the median and the 99th percentile of each part, in seconds."""
        parts = zip(*map(self.parts_of, swaps), strict=True) if swaps else ((), (), ())
        named = {**dict(zip(("room", "start", "rest"), parts, strict=True)), "end": self.ends_s}
        return {
            f"{name}_p{rank}_s": round(percentile(list(values), rank), 3)
            for name, values in named.items()
            if values
            for rank in (50, 99)
        }


@contextmanager
def followed_log(log: Path) -> Iterator[RouterTimeline]:
    """Follow a launcher's log within the context."""
    timeline, partial = RouterTimeline(), ""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)

        def read() -> None:
            nonlocal partial
            *lines, partial = (partial + file.read()).split("\n")
            for line in lines:
                timeline.add_line(line, time.monotonic())

        with polling(read, interval_s=POLL_S):
            yield timeline


def cpu_s(launcher: psutil.Process) -> dict[str, float]:
    """Return the processor seconds of a launcher and of its children, by what they run.

    Those of a zygote include what it has forked, also what has ended.
    """
    seconds = {"launcher": _own_cpu_s(launcher)}
    for process in launcher.children():
        name = next((word for word in process.cmdline() if word.startswith("faasmoe_")), "other")
        times = process.cpu_times()
        total = _own_cpu_s(process) + times.children_user + times.children_system
        total += sum(map(_own_cpu_s, process.children()))
        seconds[name] = seconds.get(name, 0.0) + total
    return seconds


def _own_cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0  # it has ended meanwhile
    return float(times.user + times.system)
