"""Our side as its users run it: a MoEModel file, sandboxes forked from the zygote, the router.

The process that enters `serving` is the launcher, and its memory and time count as the launcher's.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sides import Side, running
from benchmarks.usage import Memory, mapped_bytes

from faasmoe_expert.store import Store
from faasmoe_operator.cli import router
from faasmoe_operator.cli.deployment import Deployment
from faasmoe_operator.control.residency import Residents, make_resident
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient
from faasmoe_operator.platforms import ProcessPlatform

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


def write_moemodel(
    path: Path, *, checkpoint: Path, store: Path, experts_per_function: int, max_model_len: int
) -> None:
    """Write the MoEModel file of the benchmark."""
    spec = {
        "model": {"source": checkpoint.as_uri()},
        "store": {"path": str(store)},
        "granularity": {"expertsPerFunction": experts_per_function},
        "router": {"maxModelLen": max_model_len, "device": "cpu"},
        "experts": {"device": "cpu", "threads": 1, "functionsPerSandbox": 1},
    }
    document = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": "bench"},
        "spec": spec,
    }
    path.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML too


@asynccontextmanager
async def serving(moemodel: Path) -> AsyncIterator[Fleet]:
    """Serve a MoEModel file as long as the context lasts."""
    deployment = Deployment.load(moemodel)
    store = deployment.open_store()
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        async with ProcessPlatform(token=token) as platform:
            residents = await _make_resident(deployment, store, platform, token)
            assert platform.zygote_pid is not None
            pids = {"launcher": os.getpid(), "zygote": platform.zygote_pid}
            sandbox_pids = tuple(s.pid for s, _ in residents.sandboxes if s.pid is not None)
            table = Path(folder) / "functions.json"
            table.write_text(json.dumps(residents.table(store.manifest.digest).to_json()))
            async with running(
                "benchmarks.functions_side",
                *map(str, (*pids.values(), *sandbox_pids)),
                environment=router.environment(deployment, ENDPOINT, table=table, token=token),
            ) as side:
                pids["router"] = side.pid
                yield Fleet(side, store, pids, sandbox_pids, len(residents.functions))


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
