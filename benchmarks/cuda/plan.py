"""Extent and time limit of the GPU benchmark."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.geometry import CheckpointGeometry, qwen_geometry, small_geometry

SHUTDOWN_MARGIN_S = 60.0  # reserve of the time limit; a worker may take 40 s to stop


@dataclass(frozen=True, slots=True)
class RunAmount:
    """Extent of the measurement of one system.

    Attributes:
        batches: batch sizes in order of importance.
        tokens: tokens to generate per request.
        rounds: runs at each batch size, after a warm-up.
    """

    batches: tuple[int, ...]
    tokens: int
    rounds: int


@dataclass(frozen=True, slots=True)
class FunctionsVariant:
    """A configuration of the functions.

    Attributes:
        name: label in tables and figures.
        device: device of the sandboxes.
        experts_per_function: experts of one layer per function.
        n_sandboxes: number of sandboxes.
        amount: extent of the measurement.
        threads: threads per sandbox.
    """

    name: str
    device: str
    experts_per_function: int
    n_sandboxes: int
    amount: RunAmount
    threads: int = 1

    def settings(self, geometry: CheckpointGeometry) -> dict[str, Any]:
        """Return fields of spec.experts of a MoEModel."""
        n_functions = -(-geometry.experts // self.experts_per_function) * geometry.layers
        per_sandbox = -(-n_functions // self.n_sandboxes)
        return {
            "device": self.device,
            "threads": self.threads,
            "functionsPerSandbox": per_sandbox,
        }


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """Extent of the benchmark.

    Attributes:
        device: device of the router and of the baseline.
        geometry: sizes of the model.
        amount: extent of the measurement of the baseline.
        variants: configurations of functions in order of importance.
        attached_experts: experts of the function whose attach is timed.
        attaches: number of timed attaches.
        kv_cache_bytes: size of the KV cache of each system.
        time_limit_s: time limit of the whole benchmark.
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
        """Largest batch size."""
        return max(self.amount.batches)


def full_plan(device: str, layers: int, time_limit_s: float) -> CudaPlan:
    """Return the plan whose figures are published."""
    geometry = qwen_geometry(layers)
    amount = RunAmount((64, 1, 8, 256, 32, 128), 40, 2)
    variants = _variants(device, geometry.experts, amount, RunAmount((64, 1, 8), 12, 1))
    return CudaPlan(device, geometry, amount, variants, 20, 8, 8 << 30, time_limit_s)


def quick_plan(device: str, time_limit_s: float) -> CudaPlan:
    """Return a smoke test that takes seconds; its figures are meaningless."""
    geometry, amount = small_geometry(), RunAmount((8, 1), 10, 1)
    variants = _variants(device, geometry.experts, amount, amount)
    return CudaPlan(device, geometry, amount, variants, 3, 2, 64 << 20, time_limit_s)


def _variants(
    device: str, n_experts: int, amount: RunAmount, cpu_amount: RunAmount
) -> tuple[FunctionsVariant, ...]:
    """Return three functions per layer on device and on CPU, then other layouts on the device.

    Sandbox processes time-share a device; functions of the same sandbox run one after the other.
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
    """Remaining time until a limit, minus SHUTDOWN_MARGIN_S."""

    def __init__(self, limit_s: float) -> None:
        self._end_s = time.monotonic() + limit_s - SHUTDOWN_MARGIN_S

    @property
    def remaining_s(self) -> float:
        """Remaining seconds; negative after the deadline."""
        return self._end_s - time.monotonic()
