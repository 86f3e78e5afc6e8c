"""How long one step of an engine takes: weights read plus products computed plus calls.

A step of `rows` rows (one per decoding sequence, and the prompt's chunk) reads the router's dense
weights once and each expert that any row picks once. With E experts, top-k and evenly spread
routing, E * (1 - (1 - k/E) ** rows) experts of a layer are hit. The blocks of a layer are computed
in parallel on the nodes that hold them. Layers come one after the other.
"""

from __future__ import annotations

from collections import Counter

from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.geometry import ModelGeometry


class StepTime:
    """Step times of one kind of engine.

    Args:
        geometry: the model.
        costs: costs of one node.
        call_s: what one layer's call costs beyond weights and products; 0 for experts in process.
        expert_parallel: nodes over which the experts of one layer are computed in parallel.
        dense_parallel: nodes over which the dense weights are.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        costs: Calibration,
        *,
        call_s: float,
        expert_parallel: float = 1.0,
        dense_parallel: float = 1.0,
    ) -> None:
        self._geometry = geometry
        self._costs = costs
        self._calls_s = len(geometry.layers) * call_s
        self._expert_parallel = expert_parallel
        self._dense_parallel = dense_parallel
        self._shapes = Counter(
            (layer.num_experts, layer.top_k, layer.expert_bytes) for layer in geometry.layers
        )
        self._by_rows: dict[int, tuple[float, float]] = {}

    def step_s(self, rows: int, *, experts_slowdown: float = 1.0) -> float:
        """Return the seconds of a step.

        Args:
            rows: decoding sequences and prompt tokens.
            experts_slowdown: factor on the functions' time, of nodes that others use as well.
        """
        others_s, experts_s = self._parts_s(rows)
        return others_s + experts_slowdown * experts_s

    def calls_s(self, rows: int) -> float:
        """Return the seconds that calls are in flight in a step, over all layers."""
        return self._calls_s + self._parts_s(rows)[1]

    def experts_share(self, rows: int) -> float:
        """Return the part of a step in which functions compute."""
        others_s, experts_s = self._parts_s(rows)
        return experts_s / (others_s + experts_s)

    def _parts_s(self, rows: int) -> tuple[float, float]:
        """Return the seconds of everything but the experts, and of the experts."""
        parts = self._by_rows.get(rows)
        if parts is None:
            others_s = self._costs.step_s + self._calls_s + self._dense_s(rows)
            parts = self._by_rows[rows] = (others_s, self._experts_s(rows))
        return parts

    def _experts_s(self, rows: int) -> float:
        n_pairs, hit_bytes = 0, 0.0
        for (num_experts, top_k, expert_bytes), n_layers in self._shapes.items():
            hit_bytes += n_layers * expert_bytes * distinct_experts(num_experts, top_k, rows)
            n_pairs += n_layers * top_k * rows
        read_s = hit_bytes / self._costs.read_bytes_per_s
        products_s = 2 * n_pairs * self._geometry.expert_weights / self._costs.flops_per_s
        return (read_s + products_s) / self._expert_parallel

    def _dense_s(self, rows: int) -> float:
        weights = self._geometry.dense_weights
        read_s = 2 * weights / self._costs.read_bytes_per_s
        return (read_s + 2 * rows * weights / self._costs.flops_per_s) / self._dense_parallel


def distinct_experts(num_experts: int, top_k: int, rows: int) -> float:
    """Return how many experts of a layer `rows` rows hit, with evenly spread routing."""
    missed: float = (1 - top_k / num_experts) ** rows
    return num_experts * (1 - missed)
