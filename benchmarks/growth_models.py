"""Memory and CPU time of `faasmoe up` at rest by the number of its models.

Tiny models of the same checkpoint, each with its own store, behind one endpoint; routers and
functions have ended. Reads the process tree of the command, whatever processes it consists of.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evaluation.meter import ProcessTree
from benchmarks.geometry import small_geometry
from benchmarks.static_deployment import make_model_in_subprocess
from benchmarks.zero import (
    MANY_MEMORY,
    START_TIMEOUT_S,
    ZERO_TIMEOUT_S,
    is_at_zero,
    write_models,
)
from faasmoe_up import running_up, wait_until

REST_S = 20.0


@dataclass(frozen=True, slots=True)
class ModelsAtRest:
    """What models take while nobody uses them.

    Attributes:
        memory_bytes: PSS of all processes.
        cpu_cores: mean number of cores that they use.
        processes: their number.
    """

    memory_bytes: int
    cpu_cores: float
    processes: int


def measure_models(counts: Sequence[int], *, cache: Path) -> dict[int, ModelsAtRest]:
    """Return what these numbers of models take at rest.

    Args:
        counts: numbers of models.
        cache: folder of the checkpoint, which is generated unless it exists.
    """
    checkpoint, _ = asyncio.run(make_model_in_subprocess(small_geometry(), cache))
    found: dict[int, ModelsAtRest] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="growth-") as name:
            files = write_models(Path(name), checkpoint, count, linked_stores=True)
            options = ("--memory", MANY_MEMORY) if count > 1 else ()
            log = Path(name) / "up.log"
            with running_up(files, log, *options, timeout_s=START_TIMEOUT_S) as up:
                wait_until(lambda: is_at_zero(up), timeout_s=ZERO_TIMEOUT_S, what="zero")
                found[count] = _measure_rest(up.process.pid)
        print(f"  {count} models at rest: {found[count]}", flush=True)
    return found


def _measure_rest(launcher: int) -> ModelsAtRest:
    tree = ProcessTree([launcher])
    cpu_s, started_s = tree.cpu_s(), time.monotonic()
    time.sleep(REST_S)
    cores = (tree.cpu_s() - cpu_s) / (time.monotonic() - started_s)
    return ModelsAtRest(tree.memory(0.0).total, cores, len(tree.processes()))


def rows_of(found: Mapping[int, ModelsAtRest]) -> dict[str, dict[int, float]]:
    """Return values by the number of models, by the name of their row."""
    return {
        "memory at rest, bytes": {n: float(x.memory_bytes) for n, x in found.items()},
        "CPU at rest, cores": {n: x.cpu_cores for n, x in found.items()},
        "processes at rest": {n: float(x.processes) for n, x in found.items()},
    }
