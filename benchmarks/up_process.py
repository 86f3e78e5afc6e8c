"""`faasmoe up` as a child process, with access to its status, processes and memory."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from benchmarks.resource_usage import MemoryUsage, mapped_bytes
from benchmarks.server_process import free_port, terminate
from benchmarks.worker import ROOT

from faasmoe_contracts.store import Store
from faasmoe_operator.control.local_model import LocalModel

START_TIMEOUT_S = 300.0
IDLE_TIMEOUT_S = 120.0
POLL_S = 0.05
LOG_CHARACTERS = 4000
ZYGOTE = "faasmoe_expert.zygote"
ROUTER_NAME = "faasmoe_router"


@dataclass(frozen=True, slots=True)
class UpProcess:
    """A running `faasmoe up`; created by `running_up`.

    Attributes:
        launcher: the process of `faasmoe up`.
        url: base URL of the router.
        control_url: base URL of the control API.
        http: HTTP client that sends the token of the control API.
        store: the store of the model.
        pool: size of the warm pool.
    """

    launcher: psutil.Process
    url: str
    control_url: str
    http: aiohttp.ClientSession
    store: Store
    pool: int

    def processes(self) -> list[psutil.Process]:
        """Return the launcher and all its descendants."""
        return [self.launcher, *self.launcher.children(recursive=True)]

    def sandboxes(self) -> list[psutil.Process]:
        """Return the sandboxes, which are the children of the zygote."""
        children = self.launcher.children()
        zygote = next(process for process in children if ZYGOTE in process.cmdline())
        return [p for p in zygote.children() if p.status() != psutil.STATUS_ZOMBIE]

    def router(self) -> psutil.Process:
        """Return the router, which its zygote has forked and named."""
        return next(p for p in self.processes() if p.name() == ROUTER_NAME)

    async def status(self) -> dict[str, Any]:
        """Return the response to GET /v1/status."""
        async with self.http.get(f"{self.control_url}/v1/status") as response:
            response.raise_for_status()
            return dict(await response.json())

    async def wait_pool_ready(self) -> None:
        """Wait until the warm pool is full."""
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        while (await self.status())["pool"]["ready"] != self.pool:
            await _poll_or_raise(deadline_s, "the warm pool did not fill up")

    async def wait_idle(self) -> int:
        """Wait until all functions are at zero; return the number of remaining sandboxes."""
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            status = await self.status()
            at_zero = not any(f["desired"] or f["ready"] for f in status["functions"])
            sandboxes = status["sandboxes"]
            if at_zero and len(sandboxes) == self.pool == status["pool"]["ready"]:
                return len(self.sandboxes())
            await _poll_or_raise(deadline_s, "functions did not scale to zero")

    def memory(self) -> MemoryUsage:
        """Return the total memory of all processes."""
        return MemoryUsage.sum_of(MemoryUsage.of_pid(process.pid) for process in self.processes())

    def sandbox_memory(self) -> tuple[MemoryUsage, int]:
        """Return the total memory of the sandboxes and the part that is pages of the store."""
        pids = [process.pid for process in self.sandboxes()]
        pages = sum(mapped_bytes(pid, self.store.path) for pid in pids)
        return MemoryUsage.sum_of(MemoryUsage.of_pid(pid) for pid in pids), pages

    def overhead_bytes(self) -> dict[str, int]:
        """Return the memory without pages of the store, by kind of process."""
        sandboxes = {process.pid for process in self.sandboxes()}
        overhead: dict[str, int] = {}
        for process in self.processes():
            process_kind = "sandboxes" if process.pid in sandboxes else _process_kind(process)
            size = MemoryUsage.of_pid(process.pid).total - mapped_bytes(
                process.pid, self.store.path
            )
            overhead[process_kind] = overhead.get(process_kind, 0) + size
        return overhead

    @property
    def floor_bytes(self) -> int:
        """Size of all weights, counted once."""
        return self.store.manifest.weight_bytes


@asynccontextmanager
async def running_up(
    moemodel: Path, *, variables: Mapping[str, str] | None = None
) -> AsyncIterator[UpProcess]:
    """Run `faasmoe up` with a prepared store for the lifetime of the context.

    Args:
        moemodel: the MoEModel file.
        variables: further environment variables.

    Raises:
        RuntimeError: it exited or did not become healthy. Any exception gets the end of its log as
            a note.
    """
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        port, log = free_port(), Path(folder) / "log"
        command = ("-m", "faasmoe_operator.cli", "up", "-f", str(moemodel), "--port", str(port))
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *command, "--skip-verify"),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, **(variables or {}), "XDG_RUNTIME_DIR": folder},
            )
        try:
            await wait_serving(process, log)
            runtime_info = _read_runtime_info(Path(folder))
            token = {"Authorization": f"Bearer {runtime_info['token']}"}
            deployment = LocalModel.load(moemodel)
            async with aiohttp.ClientSession(headers=token) as http:
                yield UpProcess(
                    psutil.Process(process.pid),
                    f"http://127.0.0.1:{port}",
                    runtime_info["control_url"],
                    http,
                    deployment.open_store(),
                    deployment.model.spec.experts.warm_pool,
                )
        except Exception as error:
            error.add_note((await asyncio.to_thread(log.read_text))[-LOG_CHARACTERS:])
            raise
        finally:
            await terminate(process)


def _process_kind(process: psutil.Process) -> str:
    """Return the kind of a process, derived from its name or the module that it runs."""
    own_name: str = process.name()
    if own_name == ROUTER_NAME:
        return own_name.removeprefix("faasmoe_")
    modules = (word for word in process.cmdline() if word.startswith("faasmoe_"))
    name: str = next(modules, own_name)
    return name.removeprefix("faasmoe_")


async def wait_serving(process: asyncio.subprocess.Process, log: Path) -> None:
    """Wait until the log of a `faasmoe up` says that it serves.

    Raises:
        RuntimeError: it exited or is late.
    """
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while "OpenAI base URL" not in (text := await asyncio.to_thread(log.read_text)):
        if process.returncode is not None:
            raise RuntimeError(f"faasmoe up ended with status {process.returncode}:\n{text}")
        await _poll_or_raise(deadline_s, f"faasmoe up did not become healthy:\n{text}")


def _read_runtime_info(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("faasmoe/up-*/control.json")
    return dict(json.loads(file.read_text(encoding="utf-8")))


async def _poll_or_raise(deadline_s: float, what: str) -> None:
    if time.monotonic() > deadline_s:
        raise RuntimeError(what)
    await asyncio.sleep(POLL_S)
