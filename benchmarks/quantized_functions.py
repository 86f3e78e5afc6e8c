"""Attach times and memory of functions with quantised experts, in a real sandbox process."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.geometry import CheckpointGeometry, make_checkpoint
from benchmarks.report import Spread
from benchmarks.resource_usage import MemoryUsage

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.store import QuantizationEntry, Store
from faasmoe_contracts.wire import Dtype, OutputMode, encode_request
from faasmoe_router.checkpoint.prepare import prepare

ROUNDS = 5
START_TIMEOUT_S = 60.0
_LISTENS = re.compile(r"listen(?:s|ing) on ([\d.]+):(\d+)")


def measure_functions(
    geometry: CheckpointGeometry,
    schemes: Sequence[str],
    *,
    folder: Path,
    experts_per_function: int,
) -> dict[str, dict[str, Any]]:
    """Return the figures of each scheme.

    Args:
        geometry: sizes of the model.
        schemes: schemes of the experts; "none" for bfloat16.
        folder: keeps the checkpoint and the stores.
        experts_per_function: experts of one layer in one function.
    """
    checkpoint = folder / geometry.name
    make_checkpoint(geometry, checkpoint)
    figures = {}
    for scheme in schemes:
        store = prepare(
            str(checkpoint),
            folder / f"{geometry.name}-{scheme}-store",
            quantization=QuantizationEntry(scheme),
        )
        figures[scheme] = _measure_scheme(store, experts_per_function)
    return figures


def _measure_scheme(store: Store, experts_per_function: int) -> dict[str, Any]:
    blocks = _blocks(store, experts_per_function)
    for entry in store.manifest.layers:  # into the page cache
        (store.path / entry.file).read_bytes()
    first_ms: list[float] = []
    later_ms: list[float] = []
    with running_sandbox(capacity=len(blocks) + 1) as sandbox:
        # The process is warm once another function was attached and computed.
        sandbox.attach(store, "warm", *blocks[-1])
        sandbox.compute(store, "warm", *blocks[-1])
        sandbox.detach("warm")
        for round_number in range(ROUNDS):
            for number, (layer, experts) in enumerate(blocks[:-1]):
                elapsed_ms = sandbox.attach(store, f"f{number}", layer, experts)
                (later_ms if round_number else first_ms).append(elapsed_ms)
                sandbox.detach(f"f{number}")
        idle = sandbox.memory()
        for number, (layer, experts) in enumerate(blocks):
            sandbox.attach(store, f"f{number}", layer, experts)
            sandbox.compute(store, f"f{number}", layer, experts)
        used_bytes = sandbox.memory().total - idle.total
    weight_bytes = sum(x.expert_bytes * x.num_experts for x in store.manifest.layers)
    return {
        "function_bytes": store.manifest.layers[0].expert_bytes * experts_per_function,
        "first_attach_ms": Spread.from_values(first_ms),
        "attach_ms": Spread.from_values(later_ms),
        "weight_bytes": weight_bytes,
        "memory_bytes": used_bytes,
        "memory_over_weights": used_bytes / weight_bytes,
    }


def _blocks(store: Store, size: int) -> list[tuple[int, list[int]]]:
    """Return layer and experts of every function."""
    return [
        (layer.index, list(range(start, min(start + size, layer.num_experts))))
        for layer in store.manifest.layers
        for start in range(0, layer.num_experts, size)
    ]


class Sandbox:
    """A sandbox process, called over one connection."""

    def __init__(self, pid: int, host: str, port: int) -> None:
        self._pid = pid
        self._connection = http.client.HTTPConnection(host, port)

    def attach(self, store: Store, name: str, layer: int, experts: Sequence[int]) -> float:
        """Attach a function; return the milliseconds until the response."""
        body = {
            "store": str(store.path),
            "model_digest": store.manifest.digest,
            "layers": [layer],
            "experts": list(experts),
        }
        start_s = time.perf_counter()
        self._request("PUT", name, json.dumps(body).encode())
        return 1e3 * (time.perf_counter() - start_s)

    def detach(self, name: str) -> None:
        """Detach a function."""
        self._request("DELETE", name, b"")

    def compute(self, store: Store, name: str, layer: int, experts: Sequence[int]) -> None:
        """Send a frame with one row for each expert."""
        n_rows, entry = len(experts), store.manifest.layers[layer]
        dtype = Dtype[store.manifest.model.dtype.upper()]
        frame = encode_request(
            bytes(n_rows * entry.hidden_size * dtype.itemsize),
            dtype=dtype,
            mode=OutputMode.REDUCED,
            layer=layer,
            hidden_size=entry.hidden_size,
            n_rows=n_rows,
            pair_row=np.arange(n_rows, dtype=np.int32),
            pair_expert=np.asarray(experts, dtype=np.int32),
            pair_weight=np.ones(n_rows, dtype=np.float32),
        )
        self._request("POST", name, b"".join(frame))

    def memory(self) -> MemoryUsage:
        """Return the process's memory."""
        return MemoryUsage.of_pid(self._pid)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _request(self, method: str, name: str, body: bytes) -> None:
        self._connection.request(method, f"/v1/functions/{name}", body)
        response = self._connection.getresponse()
        text = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {name}: got status {response.status}: {text!r}")


@contextmanager
def running_sandbox(*, capacity: int) -> Iterator[Sandbox]:
    """Run a sandbox of one thread for the lifetime of the context."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FAASMOE_")}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        environment |= {
            "FAASMOE_PORT": "0",
            "FAASMOE_DEVICE": "cpu",
            "FAASMOE_CAPACITY": str(capacity),
            "FAASMOE_VERIFIED_DIR": f"{folder}/verified",
            PARENT_PID_ENV: str(os.getpid()),
        }
        command = [sys.executable, "-m", "faasmoe_expert"]
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
            try:
                sandbox = Sandbox(process.pid, *_address(process, Path(log.name)))
                try:
                    yield sandbox
                finally:
                    sandbox.close()
            finally:
                process.terminate()


def _address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        text = log.read_text(errors="replace")
        if found := _LISTENS.search(text):
            return found[1], int(found[2])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the sandbox does not listen: {log.read_text(errors='replace')}")
