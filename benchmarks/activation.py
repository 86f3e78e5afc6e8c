"""From a wake to the first answer: one function at a time, brought up from zero and called.

Does what a router does: follows the function table, wakes, and calls the new address. The call has
a row for each of the function's experts, so that it computes with all its weights.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
from benchmarks.served import Served

from faasmoe_expert.table import FunctionSpec, FunctionTable
from faasmoe_expert.wire import Dtype, Mode, encode_request

WAKE_TIMEOUT_S = 60.0
ROUTER = "benchmark"


class Table:
    """The function table as it is now; `following` keeps it so."""

    def __init__(self) -> None:
        self.specs: dict[str, FunctionSpec] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._changed = asyncio.Condition()

    async def address(self, function: str) -> str:
        """Wait for a function's address; raises TimeoutError."""
        async with asyncio.timeout(WAKE_TIMEOUT_S), self._changed:
            await self._changed.wait_for(lambda: bool(self._addresses.get(function)))
            return self._addresses[function][0]

    async def take(self, line: bytes) -> None:
        """Take a line of the table's stream."""
        message = json.loads(line)
        async with self._changed:
            if message["kind"] == "snapshot":
                entries = FunctionTable.from_json(message["table"]).functions
                self.specs = {entry.spec.id: entry.spec for entry in entries}
                self._addresses = {entry.spec.id: entry.addresses for entry in entries}
            for change in message.get("functions", ()):
                self._addresses[change["id"]] = tuple(change["addresses"])
            self._changed.notify_all()


@asynccontextmanager
async def following(model: Served) -> AsyncIterator[Table]:
    """Follow the function table as long as the context lasts."""
    table, begun = Table(), asyncio.Event()

    async def follow() -> None:
        forever = aiohttp.ClientTimeout(total=None)
        url = f"{model.control_url}/v1/table"
        async with model.http.get(url, timeout=forever) as response:
            response.raise_for_status()
            async for line in response.content:
                await table.take(line)
                begun.set()

    follower = asyncio.create_task(follow())
    try:
        await asyncio.wait_for(begun.wait(), WAKE_TIMEOUT_S)
        yield table
    finally:
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)


async def activations_s(model: Served, *, rounds: int) -> tuple[list[float], int]:
    """Return the time of each activation, and how many sandboxes are left when all are idle.

    Every function is brought up once in each round, with the pool full when it is woken; a round
    begins with all functions at zero.
    """
    times_s: list[float] = []
    left = 0
    async with following(model) as table:
        for number in range(rounds):
            left = await model.wait_idle()
            for spec in table.specs.values():
                await model.wait_pool()
                times_s.append(await _activate(model, table, spec))
            print(f"  round {number + 1} of {rounds}: {times_s[-1]:.3f} s last", flush=True)
        left = await model.wait_idle()
    return times_s, left


async def _activate(model: Served, table: Table, spec: FunctionSpec) -> float:
    frame = _frame(model, spec)
    begun_s = time.perf_counter()
    body = {"router": ROUTER, "sent_at_s": time.time(), "functions": [spec.id]}
    async with model.http.post(f"{model.control_url}/v1/wake", json=body) as response:
        response.raise_for_status()
    address = await table.address(spec.id)
    async with model.http.post(f"http://{address}/v1/functions/{spec.id}", data=frame) as response:
        response.raise_for_status()
        await response.read()
    return time.perf_counter() - begun_s


def _frame(model: Served, spec: FunctionSpec) -> bytes:
    """Return a call with one row for each expert of the function."""
    hidden, n_rows = model.store.manifest.model.hidden_size, len(spec.experts)
    values = np.random.default_rng(0).standard_normal((n_rows, hidden), np.float32)  # [T, H]
    rows = (values.view(np.uint32) >> 16).astype(np.uint16)  # [T, H], the bits of bfloat16
    buffers = encode_request(
        rows.tobytes(),
        dtype=Dtype.BFLOAT16,
        mode=Mode.REDUCED,
        layer=spec.layers[0],
        hidden_size=hidden,
        n_rows=n_rows,
        pair_row=np.arange(n_rows, dtype=np.int32),
        pair_expert=np.array(spec.experts, np.int32),
        pair_weight=np.ones(n_rows, np.float32),
    )
    return b"".join(buffers)
