"""What a model's control core counts, for its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CoreCounts:
    """One model's functions and sandboxes.

    Attributes:
        functions: functions that the model is cut into.
        active: functions with a replica that serves.
        replicas: replicas that serve.
        sandboxes: sandboxes that are not gone.
        ready: sandboxes that answer.
        generic: ready sandboxes that hold no function.
        tenant_keys: API keys of each tenant, as routers report them; None before one has.
        trouble: why sandboxes cannot be had; empty if they can.
    """

    functions: int = 0
    active: int = 0
    replicas: int = 0
    sandboxes: int = 0
    ready: int = 0
    generic: int = 0
    tenant_keys: Mapping[str, int] | None = field(default=None)
    trouble: str = ""
