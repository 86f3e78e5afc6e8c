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

from benchmarks.geometry import Geometry
from benchmarks.sides import ROOT, Side, running
from benchmarks.usage import Memory, mapped_bytes

from faasmoe_expert.store import Store
from faasmoe_operator.cli import router
from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.control.residency import Residents, make_resident
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient
from faasmoe_operator.platforms import ProcessPlatform
from faasmoe_operator.platforms.zygote import near_variables, running_zygote

logger = logging.getLogger(__name__)

ENDPOINT = router.Endpoint("127.0.0.1", 1)  # told to the router, which is not asked to listen


@dataclass(frozen=True, slots=True)
class Fleet:
    """A model that is served.

    Attributes:
        side: the router.
        store: the prepared model.
        pids: every process but the sandboxes, by name.
        sandbox_pids: the sandboxes.
        n_functions: functions in them.
    """

    side: Side
    store: Store
    pids: dict[str, int]
    sandbox_pids: tuple[int, ...]
    n_functions: int

    def memory(self) -> dict[str, Memory]:
        """Return the memory of each process; the sandboxes' are numbered."""
        named = {name: Memory.of(pid) for name, pid in self.pids.items()}
        sandboxes = {f"sandbox {i}": Memory.of(pid) for i, pid in enumerate(self.sandbox_pids)}
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


async def make_model(geometry: Geometry, folder: Path) -> tuple[Path, Path]:
    """Return checkpoint and store; what is not there is made, in a process with torch."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.geometry", str(folder), json.dumps(asdict(geometry))),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the model could not be made: status {process.returncode}")
    made = {name: Path(path) for name, path in json.loads(output.splitlines()[-1]).items()}
    return made["checkpoint"], made["store"]


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
class Resident:
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
async def resident(moemodel: Path) -> AsyncIterator[Resident]:
    """Keep every function of a MoEModel file in a sandbox as long as the context lasts."""
    deployment = Deployment.load(moemodel)
    store = deployment.open_store()
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        socket = Path(folder) / "zygote.sock"
        async with (
            running_zygote(
                socket, token=token, store=store.path, device=deployment.template.device
            ) as zygote,
            ProcessPlatform(socket=socket) as platform,
        ):
            residents = await _make_resident(deployment, store, platform, token)
            table = Path(folder) / "functions.json"
            table.write_text(json.dumps(residents.table(store.manifest.digest).to_json()))
            yield Resident(
                _environment(deployment, table=table, token=token, sockets=socket.parent),
                store,
                {"launcher": os.getpid(), "zygote": zygote.pid},
                tuple(s.pid for s, _ in residents.sandboxes if s.pid is not None),
                len(residents.functions),
            )


@asynccontextmanager
async def serving(moemodel: Path) -> AsyncIterator[Fleet]:
    """Serve a MoEModel file as long as the context lasts."""
    async with (
        resident(moemodel) as found,
        running(
            "benchmarks.functions_side",
            *map(str, (*found.pids.values(), *found.sandbox_pids)),
            environment=found.environment,
        ) as side,
    ):
        pids = {**found.pids, "router": side.pid}
        yield Fleet(side, found.store, pids, found.sandbox_pids, found.n_functions)


def _environment(
    deployment: Deployment, *, table: Path, token: str, sockets: Path
) -> dict[str, str]:
    """Return the router's environment with a fixed table in place of a control process."""
    environment = router.environment(deployment, ENDPOINT, control_url="", token=token)
    del environment["FAASMOE_CONTROL_URL"]
    return {**environment, **near_variables(sockets), "FAASMOE_TABLE": str(table)}


async def _make_resident(
    deployment: Deployment, store: Store, platform: ProcessPlatform, token: str
) -> Residents:
    functions = deployment.functions(store.manifest, key=secrets.token_bytes(32))
    async with SandboxClient(token=token) as client:
        return await make_resident(
            functions,
            platform,
            client,
            template=deployment.template,
            store=ModelStore(store.path, store.manifest.digest),
            progress=logger.info,
        )
