"""Limits of the gateway in front of four routers that answer at once: what one connection gets.

A tenant with a limit of generated tokens sends requests over one keep-alive connection, each as
soon as the last is answered. Its bucket is emptied first; then what is admitted is compared with
what the limit admits in the same time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import psutil

from faasmoe_contracts.gateway_file import (
    GatewayFile,
    LimitsEntry,
    ModelEntry,
    RouterEntry,
    TenantEntry,
    TenantModelEntry,
)

N_ROUTERS = 4
TOKENS_PER_MINUTE = 12_000
TOKENS = 10  # of each answer
SECONDS = 30.0
START_TIMEOUT_S = 60.0
BODY = {"model": "m", "prompt": "the quick", "max_tokens": TOKENS}
ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-faasmoe-input-tokens: 3\r\n"
    b"x-faasmoe-output-tokens: %d\r\n\r\n{}" % TOKENS
)


async def measure_limits() -> dict[str, float]:
    """Return one connection's share of its limit, the sum over routers, and the memory."""
    with tempfile.TemporaryDirectory(prefix="gwl-") as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            counts = [0] * N_ROUTERS
            for index in range(N_ROUTERS):
                server = await asyncio.start_unix_server(
                    _answering(counts, index), str(folder / f"{index}.sock")
                )
                stack.callback(server.close)
            url, process = _start_gateway(folder)
            try:
                return await _measure(url, process, counts)
            finally:
                process.terminate()
                await asyncio.to_thread(process.wait)


def _answering(
    counts: list[int], index: int
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        await reader.readexactly(int(fields.get(b"content-length", b"0")))
        counts[index] += 1
        writer.write(ANSWER)
        await writer.drain()
        writer.close()

    return answer


def _start_gateway(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    keys = folder / "keys"
    keys.mkdir()
    (keys / "key").write_text("bench-key")
    routers = tuple(RouterEntry(str(i), str(folder / f"{i}.sock")) for i in range(N_ROUTERS))
    limits = LimitsEntry(output_tokens=TOKENS_PER_MINUTE)
    tenant = TenantEntry("bench", str(keys), (TenantModelEntry("m"),), limits=limits)
    file = folder / "gateway.json"
    file.write_bytes(GatewayFile((ModelEntry("m", "m", 4096, routers),), (tenant,)).dumps())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    variables = {"GATEWAY_FILE": str(file), "FRONT_TOKEN": "bench", "PORT": str(port)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FAASMOE_")}
    environment |= {f"FAASMOE_{name}": value for name, value in variables.items()}
    process = subprocess.Popen([sys.executable, "-m", "faasmoe_gateway"], env=environment)
    return f"http://127.0.0.1:{port}", process


async def _measure(
    url: str, process: subprocess.Popen[bytes], counts: list[int]
) -> dict[str, float]:
    headers = {"Authorization": "Bearer bench-key"}
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, trust_env=False
    ) as client:
        await _wait_until_listening(client)
        start_s = time.monotonic()
        while (await client.post("/v1/completions", json=BODY)).status_code == 200:
            pass
        emptied_s, n_before = time.monotonic(), sum(counts)
        while time.monotonic() - emptied_s < SECONDS:
            if (await client.post("/v1/completions", json=BODY)).status_code == 429:
                await asyncio.sleep(0.005)
        end_s = time.monotonic()
    steady = (sum(counts) - n_before) * TOKENS
    admitted_by_limit = TOKENS_PER_MINUTE * (1 + (end_s - start_s) / 60)
    return {
        "one_connection_share": round(steady / (TOKENS_PER_MINUTE * (end_s - emptied_s) / 60), 4),
        "limit_sum": round(sum(counts) * TOKENS / admitted_by_limit, 4),
        "routers_used": sum(count > 0 for count in counts),
        "gateway_mb": round(psutil.Process(process.pid).memory_full_info().uss / 1e6, 1),
    }


async def _wait_until_listening(client: httpx.AsyncClient) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            (await client.get("/health")).raise_for_status()
            return
        except httpx.TransportError:
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(0.05)
