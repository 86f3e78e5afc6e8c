"""One model's activity: what its controller reports, as far as it may be shown."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from faasmoe_contracts.control_messages import LoadReport
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.live.memory_time import MemoryTime
from faasmoe_operator.control.live.shown_functions import (
    FunctionWindow,
    PrivacySettings,
    UniformRandom,
)
from faasmoe_operator.control.live.timeline import EventKind, Timeline


class ModelActivity:
    """Follows one controller. All times are of its clock, in seconds.

    Args:
        functions: the model's functions by id.
        rows_per_token: most rows that one token adds to all functions together.
        now: current time.
        settings: how much of the functions is shown.
        noise: source of the noise in what is shown.

    Attributes:
        window: what is shown of the functions.
        memory: memory over time.
        timeline: the last events.
        revision: increases with everything that a viewer might see.
        n_active: functions with a replica that can be called.
    """

    def __init__(
        self,
        functions: Mapping[str, ManagedFunction],
        *,
        rows_per_token: int,
        now: float,
        settings: PrivacySettings | None = None,
        noise: UniformRandom | None = None,
    ) -> None:
        self._functions = functions
        self._noise = noise or random.SystemRandom()
        self.window = FunctionWindow(functions, rows_per_token, settings or PrivacySettings())
        self.memory = MemoryTime(sum(f.size_bytes for f in functions.values()), now=now)
        self.timeline = Timeline()
        self.revision = 0
        self.n_active = 0
        self._sandboxes: frozenset[str] = frozenset()

    @property
    def all_bytes(self) -> int:
        """Bytes of all functions."""
        return sum(function.size_bytes for function in self._functions.values())

    def add_load_report(self, report: LoadReport) -> None:
        """Add the rows of a router's calls."""
        self.window.add((name, load.rows) for name, load in report.functions.items() if load.rows)

    def add_activations(self, waited_s: Iterable[float | None], *, now: float) -> None:
        """Add activations that have finished, each with the time it took."""
        times = [seconds or 0.0 for seconds in waited_s]
        longest_s = max(times, default=0.0)
        self.timeline.add(EventKind.ACTIVATED, count=len(times), longest_s=longest_s, now=now)

    def observe(
        self,
        *,
        ready: Mapping[str, int],
        desired: Mapping[str, int],
        sandboxes: Iterable[str],
        now: float,
    ) -> None:
        """Record the fleet's state.

        Args:
            ready: replicas that can be called, of functions that have any.
            desired: replicas wanted, of functions that shall have any.
            sandboxes: ids of the sandboxes that run.
            now: current time.
        """
        active_bytes = sum(self._functions[n].size_bytes * count for n, count in ready.items())
        self.memory.update(active_bytes, now=now)
        before, self.n_active = self.n_active, len(ready)
        self.timeline.add(EventKind.SCALED_TO_ZERO, count=before - self.n_active, now=now)
        known, self._sandboxes = self._sandboxes, frozenset(sandboxes)
        self.timeline.add(EventKind.SANDBOX_STARTED, count=len(self._sandboxes - known), now=now)
        self.timeline.add(EventKind.SANDBOX_GONE, count=len(known - self._sandboxes), now=now)
        replicas = {
            name: (ready.get(name, 0), desired.get(name, 0)) for name in ready.keys() | desired
        }
        self.window.show(replicas, now=now, random=self._noise)
        self.revision += 1
