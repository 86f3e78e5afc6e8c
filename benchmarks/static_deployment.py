"""A deployment without a control process: every function stays attached to a sandbox.

It uses the same MoEModel file, zygote, sandboxes and router as `faasmoe up`, with a static routing
table, so that scaling does not disturb a measurement. The process that enters the context is the
launcher; its memory and CPU time count as the launcher's.
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
from faasmoe_operator.platforms.process import ProcessPlatform
from faasmoe_operator.platforms.zygote import ZYGOTE_COMMAND, run_zygote, shared_dir_variables

logger = logging.getLogger(__name__)

ENDPOINT = router.Endpoint("127.0.0.1", 1)  # required setting; the worker does not listen


@dataclass(frozen=True, slots=True)
class StaticDeployment:
    """A running deployment.

    Attributes:
        router: worker process with the router.
        store: the store of the model.
        pids: process ids of all processes except sandboxes, by name.
        sandbox_pids: process ids of the sandboxes.
        n_functions: number of functions.
    """

    router: WorkerProcess
    store: Store
    pids: dict[str, int]
    sandbox_pids: tuple[int, ...]
    n_functions: int

    def memory_by_process(self) -> dict[str, MemoryUsage]:
        """Return the memory of each process by name; sandboxes are numbered."""
        named = {name: MemoryUsage.of_pid(pid) for name, pid in self.pids.items()}
        sandboxes = {
            f"sandbox {i}": MemoryUsage.of_pid(pid) for i, pid in enumerate(self.sandbox_pids)
        }
        return named | sandboxes

    @property
    def floor_bytes(self) -> int:
        """Size of all weights, counted once."""
        return self.store.manifest.weight_bytes

    def experts_in_memory(self) -> float:
        """Return the fraction of the expert weights that is resident in the sandboxes."""
        layers = self.store.manifest.layers
        whole = sum(x.expert_bytes * x.num_experts + x.shared_bytes for x in layers)
        return sum(mapped_bytes(pid, self.store.path) for pid in self.sandbox_pids) / whole


async def make_model_in_subprocess(geometry: CheckpointGeometry, folder: Path) -> tuple[Path, Path]:
    """Generate a checkpoint and its store in a child process, unless they exist.

    Returns:
        The folders of the checkpoint and of the store.

    Raises:
        RuntimeError: the child failed.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.geometry", str(folder), json.dumps(asdict(geometry))),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"benchmarks.geometry ended with status {process.returncode}")
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
    """Write a MoEModel file, by default with one function per sandbox.

    Args:
        path: the file to write.
        checkpoint: folder of the checkpoint.
        store: folder of its store.
        experts_per_function: experts of one layer per function.
        max_model_len: maximum tokens of a request.
        experts: additional fields of spec.experts.
        router: additional fields of spec.router.
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
    path.write_text(json.dumps(document), encoding="utf-8")  # JSON is valid YAML


@dataclass(frozen=True, slots=True)
class ResidentFunctions:
    """Sandboxes with all functions of a model, for a router that the caller starts.

    Attributes:
        environment: environment of the router, with a static routing table.
        store: the store of the model.
        pids: process ids of launcher and zygote, by name.
        sandbox_pids: process ids of the sandboxes.
        n_functions: number of functions.
    """

    environment: dict[str, str]
    store: Store
    pids: dict[str, int]
    sandbox_pids: tuple[int, ...]
    n_functions: int


@asynccontextmanager
async def resident_functions(moemodel: Path) -> AsyncIterator[ResidentFunctions]:
    """Attach every function of a MoEModel file to a sandbox for the lifetime of the context."""
    deployment = LocalModel.load(moemodel)
    store = deployment.open_store()
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        socket = Path(folder) / "zygote.sock"
        async with (
            run_zygote(
                socket,
                token=token,
                store=store.path,
                device=deployment.template.device,
                command=("env", "FAASMOE_METRICS_MIN_TOKENS=1", *ZYGOTE_COMMAND),  # exact counts
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
    """Run sandboxes and router worker of a MoEModel file for the lifetime of the context."""
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
    """Return the router's environment with a static routing table and no control process."""
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
