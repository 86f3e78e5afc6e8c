"""Our side as its users run it: a MoEModel file, sandboxes forked from the zygote, the router.

The process that enters `serving` is the launcher, and its memory and time count as the launcher's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.geometry import CheckpointGeometry
from benchmarks.resource_usage import MemoryUsage, mapped_bytes
from benchmarks.worker import ROOT, WorkerProcess, running_worker

from faasmoe_contracts.store import Store
from faasmoe_operator.cli import router
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient
from faasmoe_operator.control.static_placement import StaticPlacement, place_all_functions
from faasmoe_operator.platforms import ProcessPlatform
from faasmoe_operator.platforms.zygote import run_zygote, shared_dir_variables

logger = logging.getLogger(__name__)

ENDPOINT = router.Endpoint("127.0.0.1", 1)  # told to the router, which is not asked to listen


@dataclass(frozen=True, slots=True)
class StaticDeployment:
    """A model that is served.

    Attributes:
        side: the router.
        store: the prepared model.
        pids: every process but the sandboxes, by name.
        sandbox_pids: the sandboxes.
        n_functions: functions in them.
    """

    router: WorkerProcess
    store: Store
    pids: dict[str, int]
    sandbox_pids: tuple[int, ...]
    n_functions: int

    def memory_by_process(self) -> dict[str, MemoryUsage]:
        """Return the memory of each process; the sandboxes' are numbered."""
        named = {name: MemoryUsage.of_pid(pid) for name, pid in self.pids.items()}
        sandboxes = {
            f"sandbox {i}": MemoryUsage.of_pid(pid) for i, pid in enumerate(self.sandbox_pids)
        }
        return named | sandboxes

    @property
    def floor_bytes(self) -> int:
        """Bytes of all weights, once."""
        files = self.store.manifest.files.items()
        return sum(file.size_bytes for name, file in files if name.endswith(".safetensors"))

    def experts_in_memory(self) -> float:
        """Return the part of the experts' weights that the sandboxes have touched."""
        layers = self.store.manifest.layers
        whole = sum(x.expert_bytes * x.num_experts + x.shared_bytes for x in layers)
        return sum(mapped_bytes(pid, self.store.path) for pid in self.sandbox_pids) / whole


async def make_model_in_subprocess(geometry: CheckpointGeometry, folder: Path) -> tuple[Path, Path]:
    """Return checkpoint and store; what is not there is made, in a process with torch."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.geometry", str(folder), json.dumps(asdict(geometry))),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the model could not be made: status {process.returncode}")
    paths = {name: Path(path) for name, path in json.loads(output.splitlines()[-1]).items()}
    return paths["checkpoint"], paths["store"]


def write_moemodel(
    path: Path,
    *,
    checkpoint: Path,
    store: Path,
    experts_per_function: int,
    max_model_len: int,
    experts: Mapping[str, Any] | None = None,
    router: Mapping[str, Any] | None = None,
) -> None:
    """Write a MoEModel file of a benchmark, with one function in each sandbox.

    Args:
        path: the file.
        checkpoint: the model.
        store: where it is prepared.
        experts_per_function: experts of a layer in one function.
        max_model_len: tokens of a request.
        experts: other settings of the sandboxes.
        router: other settings of the router.
    """
    spec = {
        "model": {"source": checkpoint.as_uri()},
        "store": {"path": str(store)},
        "granularity": {"expertsPerFunction": experts_per_function},
        "router": {"maxModelLen": max_model_len, "device": "cpu", **(router or {})},
        "experts": {"device": "cpu", "threads": 1, "functionsPerSandbox": 1, **(experts or {})},
    }
    document = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": "bench"},
        "spec": spec,
    }
    path.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML too


@dataclass(frozen=True, slots=True)
class ResidentFunctions:
    """A model whose functions are all in sandboxes, for a router that is to be started.

    Attributes:
        environment: the router's, with a fixed function table.
        store: the prepared model.
        pids: the launcher and the zygote, by name.
        sandbox_pids: the sandboxes.
        n_functions: functions in them.
    """

    environment: dict[str, str]
    store: Store
    pids: dict[str, int]
    sandbox_pids: tuple[int, ...]
    n_functions: int


@asynccontextmanager
async def resident_functions(moemodel: Path) -> AsyncIterator[ResidentFunctions]:
    """Keep every function of a MoEModel file in a sandbox as long as the context lasts."""
    deployment = LocalModel.load(moemodel)
    store = deployment.open_store()
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        socket = Path(folder) / "zygote.sock"
        async with (
            run_zygote(
                socket, token=token, store=store.path, device=deployment.template.device
            ) as zygote,
            ProcessPlatform(socket=socket) as platform,
        ):
            residents = await _attach_all(deployment, store, platform, token)
            table = Path(folder) / "functions.json"
            table.write_text(json.dumps(residents.routing_table(store.manifest.digest).to_json()))
            yield ResidentFunctions(
                _static_router_environment(
                    deployment, table=table, token=token, sockets=socket.parent
                ),
                store,
                {"launcher": os.getpid(), "zygote": zygote.pid},
                tuple(s.pid for s, _ in residents.sandboxes if s.pid is not None),
                len(residents.functions),
            )


@asynccontextmanager
async def running_static_deployment(moemodel: Path) -> AsyncIterator[StaticDeployment]:
    """Serve a MoEModel file as long as the context lasts."""
    async with (
        resident_functions(moemodel) as functions,
        running_worker(
            "benchmarks.router_worker",
            *map(str, (*functions.pids.values(), *functions.sandbox_pids)),
            environment=functions.environment,
        ) as worker,
    ):
        pids = {**functions.pids, "router": worker.pid}
        yield StaticDeployment(
            worker, functions.store, pids, functions.sandbox_pids, functions.n_functions
        )


def _static_router_environment(
    deployment: LocalModel, *, table: Path, token: str, sockets: Path
) -> dict[str, str]:
    """Return the router's environment with a fixed table in place of a control process."""
    environment = router.environment(deployment, ENDPOINT, control_url="", token=token)
    del environment["FAASMOE_CONTROL_URL"]
    return {**environment, **shared_dir_variables(sockets), "FAASMOE_TABLE": str(table)}


async def _attach_all(
    deployment: LocalModel, store: Store, platform: ProcessPlatform, token: str
) -> StaticPlacement:
    functions = deployment.functions(store.manifest, key=secrets.token_bytes(32))
    async with SandboxClient(token=token) as client:
        return await place_all_functions(
            functions,
            platform,
            client,
            template=deployment.template,
            store=ModelStore(store.path, store.manifest.digest),
            progress=logger.info,
        )
