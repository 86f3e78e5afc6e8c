"""A router process with tenants on top of a static deployment."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.server_process import LOG_CHARACTERS, free_port, terminate, wait_healthy
from benchmarks.static_deployment import resident_functions
from benchmarks.worker import ROOT

from faasmoe_contracts.parent_death import PARENT_PID_ENV

MODEL = "bench"
START_TIMEOUT_S = 300.0


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
    port = free_port()
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
            await wait_healthy(url, lambda: process.returncode is None, timeout_s=START_TIMEOUT_S)
            yield url
        except Exception as error:
            error.add_note((await asyncio.to_thread(log.read_text))[-LOG_CHARACTERS:])
            raise
        finally:
            await terminate(process)


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
