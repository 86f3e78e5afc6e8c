"""Which fault when: drawn from a seed, so that a run can be done again. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class FaultKind(Enum):
    """What is done to the system; the value says how often, against the others."""

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
}

QUIET_S = 3.0  # after the last kill that is done alone, so that its stalls are its own


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at_s: when, from the beginning.
        kind: what.
        choice: picks the target among those that are there then.
        lasts_s: for how long, for what has an end.
        place: where, for what has a place: a share of the bytes.
    """

    at_s: float
    kind: FaultKind
    choice: int
    lasts_s: float
    place: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this fault."""
        return {**asdict(self), "kind": self.kind.value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fault:
        """Read what `to_json` wrote."""
        return cls(**{**value, "kind": FaultKind(value["kind"])})


def draw_schedule(
    seed: int, *, duration_s: float, period_s: float = 1.0, kills_alone_s: float = 0.0
) -> list[Fault]:
    """Return the faults of a run: one in each period, the last two periods left in peace.

    Args:
        seed: of what is drawn.
        duration_s: of the run.
        period_s: between two faults.
        kills_alone_s: how long, from the beginning, sandboxes are killed and nothing else is done,
            so that what a kill costs can be told from what other faults cost. The last `PEACE_S`
            of it are left in peace.
    """
    generator = random.Random(seed)
    kinds, weights = zip(*FAULT_WEIGHTS.items(), strict=True)
    faults = []
    for n in range(max(0, int(duration_s / period_s) - 2)):
        at_s = (n + generator.random()) * period_s
        kind = generator.choices(kinds, weights)[0]
        if n * period_s < kills_alone_s:
            if (n + 1) * period_s + QUIET_S > kills_alone_s:
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
