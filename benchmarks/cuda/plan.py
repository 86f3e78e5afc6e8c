"""What the GPU's benchmark measures, and how long it may take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.geometry import CheckpointGeometry, qwen_geometry, small_geometry

SHUTDOWN_MARGIN_S = 60.0  # kept of the time limit: a side that is cut off may take 40 s to end


@dataclass(frozen=True, slots=True)
class RunAmount:
    """How much a side runs.

    Attributes:
        batches: batch sizes, the most important first.
        tokens: tokens that each request generates.
        rounds: runs at each batch size, after one that warms up.
    """

    batches: tuple[int, ...]
    tokens: int
    rounds: int


@dataclass(frozen=True, slots=True)
class FunctionsVariant:
    """A way to have the functions.

    Attributes:
        name: of the side.
        device: where they compute.
        experts_per_function: experts of a layer in one function.
        n_sandboxes: sandboxes that share the functions.
        amount: how much it runs.
        threads: of a sandbox.
    """

    name: str
    device: str
    experts_per_function: int
    n_sandboxes: int
    amount: RunAmount
    threads: int = 1

    def settings(self, geometry: CheckpointGeometry) -> dict[str, Any]:
        """Return the sandboxes' settings of a MoEModel."""
        n_functions = -(-geometry.experts // self.experts_per_function) * geometry.layers
        per_sandbox = -(-n_functions // self.n_sandboxes)
        return {
            "device": self.device,
            "threads": self.threads,
            "functionsPerSandbox": per_sandbox,
        }


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """What is measured.

    Attributes:
        device: the router's and the in-process side's.
        geometry: sizes of the model.
        amount: how much the in-process side runs.
        variants: our sides, the most important first.
        attached_experts: experts of the function whose attach is timed.
        attaches: attaches that are timed.
        kv_cache_bytes: of each side.
        time_limit_s: for everything.
    """

    device: str
    geometry: CheckpointGeometry
    amount: RunAmount
    variants: tuple[FunctionsVariant, ...]
    attached_experts: int
    attaches: int
    kv_cache_bytes: int
    time_limit_s: float

    @property
    def max_num_seqs(self) -> int:
        """The largest batch."""
        return max(self.amount.batches)


def full_plan(device: str, layers: int, time_limit_s: float) -> CudaPlan:
    """Return the plan whose figures count."""
    geometry = qwen_geometry(layers)
    amount = RunAmount((64, 1, 8, 256, 32, 128), 40, 2)
    variants = _variants(device, geometry.experts, amount, RunAmount((64, 1, 8), 12, 1))
    return CudaPlan(device, geometry, amount, variants, 20, 8, 8 << 30, time_limit_s)


def quick_plan(device: str, time_limit_s: float) -> CudaPlan:
    """Return a plan of seconds, which shows that everything works; its figures mean nothing."""
    geometry, amount = small_geometry(), RunAmount((8, 1), 10, 1)
    variants = _variants(device, geometry.experts, amount, amount)
    return CudaPlan(device, geometry, amount, variants, 3, 2, 64 << 20, time_limit_s)


def _variants(
    device: str, n_experts: int, amount: RunAmount, cpu_amount: RunAmount
) -> tuple[FunctionsVariant, ...]:
    """Return three blocks a layer, on the device and on the CPU, then other ways on the device.

    Sandboxes are processes, which take turns on a device; functions in one wait for each other.
    """
    block = -(-n_experts // 3)
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    return (
        FunctionsVariant("functions_on_device", device, block, 3, amount),
        FunctionsVariant("functions_on_cpu", "cpu", block, 3, cpu_amount, threads),
        FunctionsVariant("whole_layers_on_device", device, n_experts, 1, amount),
        FunctionsVariant("functions_in_one_sandbox", device, block, 1, amount),
    )


class Deadline:
    """The time that is left of a limit."""

    def __init__(self, limit_s: float) -> None:
        self._end_s = time.monotonic() + limit_s - SHUTDOWN_MARGIN_S

    @property
    def remaining_s(self) -> float:
        """Seconds left."""
        return self._end_s - time.monotonic()
