"""Schedules of faults, determined by a seed so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class FaultKind(Enum):
    """Kinds of fault; the values are used in reports and on the command line."""

    KILL_SANDBOX = "kill_sandbox"
    STOP_SANDBOX = "stop_sandbox"
    DELAY = "delay"
    CUT = "cut"
    FLIP_REQUEST = "flip_request"
    FLIP_ANSWER = "flip_answer"
    FLIP_STORE = "flip_store"
    LIMIT_MEMORY = "limit_memory"
    FILL_DISK = "fill_disk"
    KILL_CONTROL = "kill_control"
    STOP_CONTROL = "stop_control"
    KILL_ZYGOTE = "kill_zygote"
    KILL_ROUTER = "kill_router"
    STORE_AWAY = "store_away"
    REWRITE_STORE = "rewrite_store"


FAULT_WEIGHTS: Mapping[FaultKind, int] = {
    FaultKind.KILL_SANDBOX: 6,
    FaultKind.STOP_SANDBOX: 3,
    FaultKind.DELAY: 4,
    FaultKind.CUT: 5,
    FaultKind.FLIP_REQUEST: 4,
    FaultKind.FLIP_ANSWER: 4,
    FaultKind.FLIP_STORE: 2,
    FaultKind.LIMIT_MEMORY: 2,
    FaultKind.FILL_DISK: 1,
    FaultKind.KILL_CONTROL: 2,
    FaultKind.STOP_CONTROL: 2,
    FaultKind.KILL_ZYGOTE: 1,
    FaultKind.KILL_ROUTER: 2,
    FaultKind.STORE_AWAY: 1,
    FaultKind.REWRITE_STORE: 2,
}

QUIET_S = 3.0  # pause after the kills-only phase, so that its stalls are not due to other faults


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at_s: time since the start of the run.
        kind: kind of fault.
        choice: selects the target among those that exist at that time.
        lasts_s: duration of a temporary fault.
        place: position of a flipped bit as a fraction of the data, or relative length of a delay.
    """

    at_s: float
    kind: FaultKind
    choice: int
    lasts_s: float
    place: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {**asdict(self), "kind": self.kind.value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fault:
        """Parse the result of `to_json`."""
        return cls(**{**value, "kind": FaultKind(value["kind"])})


def draw_schedule(
    seed: int, *, duration_s: float, period_s: float = 1.0, kills_only_s: float = 0.0
) -> list[Fault]:
    """Return the faults of a run: one per period, none in the last two periods.

    Args:
        seed: seed of the random generator.
        duration_s: duration of the run.
        period_s: period of the faults.
        kills_only_s: duration of an initial phase in which sandboxes are killed and no other fault
            occurs, so that the effect of kills can be measured alone. Its last `QUIET_S` seconds
            have no faults.
    """
    generator = random.Random(seed)
    kinds, weights = zip(*FAULT_WEIGHTS.items(), strict=True)
    faults = []
    for n in range(max(0, int(duration_s / period_s) - 2)):
        at_s = (n + generator.random()) * period_s
        kind = generator.choices(kinds, weights)[0]
        if n * period_s < kills_only_s:
            if (n + 1) * period_s + QUIET_S > kills_only_s:
                continue
            kind = FaultKind.KILL_SANDBOX
        fault = Fault(
            round(at_s, 3),
            kind,
            generator.randrange(1 << 30),
            round(generator.uniform(0.2, 2.0), 3),
            round(generator.random(), 6),
        )
        faults.append(fault)
    return faults
