"""Cold-start latency of single functions: from the activation request to the first response.

The benchmark acts as a router: it watches the routing table, requests the activation of a function
and calls the new address. The call has one row per expert, so that all weights are used.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
from benchmarks.up_process import UpProcess

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTable
from faasmoe_contracts.wire import Dtype, OutputMode, encode_request

ACTIVATION_TIMEOUT_S = 60.0
ROUTER_NAME = "benchmark"


class WatchedRoutingTable:
    """The current routing table; kept up to date by `watching_routing_table`.

    Attributes:
        specs: functions by id.
    """

    def __init__(self) -> None:
        self.specs: dict[str, FunctionSpec] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._changed = asyncio.Condition()

    async def wait_for_address(self, function: str) -> str:
        """Return the address of a function once it has one.

        Raises:
            TimeoutError: none within ACTIVATION_TIMEOUT_S seconds.
        """
        async with asyncio.timeout(ACTIVATION_TIMEOUT_S), self._changed:
            await self._changed.wait_for(lambda: bool(self._addresses.get(function)))
            return self._addresses[function][0]

    async def apply_line(self, line: bytes) -> None:
        """Apply one line of the watch stream: a snapshot or a change."""
        message = json.loads(line)
        async with self._changed:
            if message["kind"] == "snapshot":
                entries = RoutingTable.from_json(message["table"]).functions
                self.specs = {entry.spec.id: entry.spec for entry in entries}
                self._addresses = {entry.spec.id: entry.addresses for entry in entries}
            for change in message.get("functions", ()):
                self._addresses[change["id"]] = tuple(change["addresses"])
            self._changed.notify_all()


@asynccontextmanager
async def watching_routing_table(model: UpProcess) -> AsyncIterator[WatchedRoutingTable]:
    """Watch the routing table for the lifetime of the context."""
    table, received_first = WatchedRoutingTable(), asyncio.Event()

    async def watch() -> None:
        forever = aiohttp.ClientTimeout(total=None)
        url = f"{model.control_url}/v1/table"
        async with model.http.get(url, timeout=forever) as response:
            response.raise_for_status()
            async for line in response.content:
                await table.apply_line(line)
                received_first.set()

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait_for(received_first.wait(), ACTIVATION_TIMEOUT_S)
        yield table
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def measure_activations_s(model: UpProcess, *, rounds: int) -> tuple[list[float], int]:
    """Activate every function once per round and measure the latency.

    A round starts with all functions scaled to zero; the warm pool is full before each activation.

    Returns:
        The latencies in seconds, and the number of sandboxes that remain when all are idle.
    """
    times_s: list[float] = []
    n_idle_sandboxes = 0
    async with watching_routing_table(model) as table:
        for number in range(rounds):
            n_idle_sandboxes = await model.wait_idle()
            for spec in table.specs.values():
                await model.wait_pool_ready()
                times_s.append(await _activate(model, table, spec))
            print(f"  round {number + 1} of {rounds}: {times_s[-1]:.3f} s last", flush=True)
        n_idle_sandboxes = await model.wait_idle()
    return times_s, n_idle_sandboxes


async def _activate(model: UpProcess, table: WatchedRoutingTable, spec: FunctionSpec) -> float:
    frame = _request_frame(model, spec)
    started_s = time.perf_counter()
    body = {"router": ROUTER_NAME, "sent_at_s": time.time(), "functions": [spec.id]}
    async with model.http.post(f"{model.control_url}/v1/wake", json=body) as response:
        response.raise_for_status()
    address = await table.wait_for_address(spec.id)
    async with model.http.post(f"http://{address}/v1/functions/{spec.id}", data=frame) as response:
        response.raise_for_status()
        await response.read()
    return time.perf_counter() - started_s


def _request_frame(model: UpProcess, spec: FunctionSpec) -> bytes:
    """Return a request frame with one row per expert of the function."""
    hidden, n_rows = model.store.manifest.model.hidden_size, len(spec.experts)
    values = np.random.default_rng(0).standard_normal((n_rows, hidden), np.float32)  # [T, H]
    rows = (values.view(np.uint32) >> 16).astype(np.uint16)  # [T, H], bfloat16 bits
    buffers = encode_request(
        rows.tobytes(),
        dtype=Dtype.BFLOAT16,
        mode=OutputMode.REDUCED,
        layer=spec.layers[0],
        hidden_size=hidden,
        n_rows=n_rows,
        pair_row=np.arange(n_rows, dtype=np.int32),
        pair_expert=np.array(spec.experts, np.int32),
        pair_weight=np.ones(n_rows, np.float32),
    )
    return b"".join(buffers)
