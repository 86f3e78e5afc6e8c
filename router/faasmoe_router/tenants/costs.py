"""What expert functions cost: for how long they were in use, and how much memory they are. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec
from faasmoe_router.dispatch.load import Reading

GB = 1e9


@dataclass(frozen=True, slots=True)
class Cost:
    """Use of expert functions.

    Attributes:
        seconds: time that calls to functions were in flight, added up over the calls; with one
            compute thread for each sandbox, what they took of CPU or GPU at most.
        gb_seconds: the same, times the size of each call's function.
    """

    seconds: float = 0.0
    gb_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Return both together."""
        return Cost(self.seconds + other.seconds, self.gb_seconds + other.gb_seconds)

    def part(self, share: float) -> Cost:
        """Return a part of it."""
        return Cost(self.seconds * share, self.gb_seconds * share)


class CostReader:
    """Turns the growing totals of a load meter into the cost since the last reading."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._before: Mapping[str, Reading] = {}

    def take(self, now: Mapping[str, Reading], specs: Mapping[str, FunctionSpec]) -> Cost:
        """Return the cost since the last call.

        Args:
            now: each function's totals.
            specs: the functions that are known; others cost their time only.
        """
        total = Cost()
        for name, reading in now.items():
            before = self._before.get(name, Reading())
            used_s = max(0.0, reading.in_flight_s - before.in_flight_s)
            spec = specs.get(name)
            size_gb = 0.0 if spec is None else size_bytes(spec, self._store) / GB
            total += Cost(used_s, used_s * size_gb)
        self._before = now
        return total


def size_bytes(spec: FunctionSpec, store: Store) -> int:
    """Return the bytes of a function's weights."""
    layers = [store.manifest.layers[layer] for layer in spec.layers]
    return sum(len(spec.experts) * layer.expert_bytes for layer in layers)
