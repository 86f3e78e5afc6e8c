"""A router process with tenants on top of a static deployment."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from benchmarks.static_deployment import resident_functions
from benchmarks.worker import ROOT

from faasmoe_contracts.parent_death import PARENT_PID_ENV

MODEL = "bench"
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_CHARACTERS = 4000


def api_key(tenant: str) -> str:
    """Return the API key of a tenant."""
    return f"sk-{tenant}"


@asynccontextmanager
async def running_tenant_router(
    moemodel: Path, folder: Path, *, tenants: Sequence[str], max_num_seqs: int
) -> AsyncIterator[str]:
    """Run a router with tenants of equal weight for the lifetime of the context.

    Args:
        moemodel: the MoEModel file.
        folder: folder for keys and log.
        tenants: names of the tenants.
        max_num_seqs: maximum number of running sequences.

    Yields:
        The base URL of the router.

    Raises:
        RuntimeError: the router did not become healthy. Any exception gets the end of the router's
            log as a note.
    """
    port = _free_port()
    async with resident_functions(moemodel) as model:
        environment = {
            **model.environment,
            "FAASMOE_PORT": str(port),
            "FAASMOE_MODEL_NAME": MODEL,
            "FAASMOE_MAX_NUM_SEQS": str(max_num_seqs),
            "FAASMOE_TENANTS_FILE": str(_write_tenants_file(folder, tenants)),
            PARENT_PID_ENV: str(os.getpid()),
        }
        log = folder / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "faasmoe_router"),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            await _wait_until_healthy(url, process)
            yield url
        except Exception as error:
            error.add_note((await asyncio.to_thread(log.read_text))[-LOG_CHARACTERS:])
            raise
        finally:
            await _terminate(process)


def _write_tenants_file(folder: Path, names: Sequence[str]) -> Path:
    tenants = []
    for name in names:
        keys = folder / "keys" / name
        keys.mkdir(parents=True)
        (keys / "key").write_text(api_key(name))
        tenants.append({"name": name, "keysPath": str(keys)})
    path = folder / "tenants.json"
    path.write_text(json.dumps({"version": 1, "model": MODEL, "tenants": tenants}))
    return path


async def _wait_until_healthy(url: str, process: asyncio.subprocess.Process) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as http:
        while process.returncode is None and time.monotonic() < deadline_s:
            try:
                async with http.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(POLL_S)
    raise RuntimeError(f"the router did not become healthy; exit status {process.returncode}")


async def _terminate(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
