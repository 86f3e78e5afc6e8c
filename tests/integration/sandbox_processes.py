"""Real sandbox processes for tests: `python -m faasmoe_expert` on a free loopback port."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.routing_table import (
    FunctionEndpoints,
    FunctionSpec,
    RoutingTable,
    make_function_id,
)
from faasmoe_contracts.store import Store

DEADLINE_S = 60.0
_LISTENS = re.compile(r"listens on ([\d.]+:\d+)")


@dataclass(frozen=True, slots=True)
class SandboxProcess:
    """A sandbox that runs and is ready.

    `http` is a client with the sandbox's base URL and token; `log` is the file of its output.
    """

    address: str
    process: subprocess.Popen[bytes]
    http: httpx.Client
    log: Path

    def attach(self, store: Store, spec: FunctionSpec) -> FunctionEndpoints:
        """Attach a function of a store; returns its entry for a function table."""
        body = {**spec.to_json(), "store": str(store.path), "model_digest": store.manifest.digest}
        response = self.http.put(f"/v1/functions/{spec.id}", json=body)
        assert response.status_code in (200, 201), response.text
        return FunctionEndpoints(spec, (self.address,))

    def attach_blocks(self, store: Store, experts_per_function: int) -> RoutingTable:
        """Attach all of a store's experts in blocks of this size, the last one maybe smaller."""
        entries = [self.attach(store, spec) for spec in block_specs(store, experts_per_function)]
        return RoutingTable(store.manifest.digest, 0, tuple(entries))


StartSandbox = Callable[..., AbstractContextManager[SandboxProcess]]
"""What the fixture `sandbox` is: `sandbox(capacity=…, token=…)`; see `running_sandbox`."""
PreparedStore = Callable[..., Store]
"""What the fixture `prepared_store` is: `prepared_store("mixtral", dtype=None)`."""


def block_specs(store: Store, experts_per_function: int) -> list[FunctionSpec]:
    """Cut every MoE layer into functions of so many experts."""
    specs = []
    for layer in store.manifest.layers:
        for start in range(0, layer.num_experts, experts_per_function):
            stop = min(start + experts_per_function, layer.num_experts)
            specs.append(make_function_spec(store, [layer.index], range(start, stop)))
    return specs


def make_function_spec(store: Store, layers: Sequence[int], experts: Sequence[int]) -> FunctionSpec:
    """Name a function of these experts in these layers."""
    digest = store.manifest.digest
    name = make_function_id(b"tests", model_digest=digest, layers=layers, experts=experts)
    return FunctionSpec(name, tuple(layers), tuple(experts))


def sandbox_env(**variables: object) -> dict[str, str]:
    """The environment of a sandbox: no FAASMOE_* but these, given without prefix, in lower case."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    env |= {f"FAASMOE_{name.upper()}": str(value) for name, value in variables.items()}
    return env | {PARENT_PID_ENV: str(os.getpid())}


@contextmanager
def running_sandbox(log: Path, *, token: str = "", **variables: object) -> Iterator[SandboxProcess]:
    """Run a sandbox until the block ends: killed then, if it does not end by SIGTERM.

    Args:
        log: file for its output.
        token: bearer token.
        variables: other settings, such as capacity=4 for FAASMOE_CAPACITY.
    """
    settings: dict[str, object] = {"port": 0, "device": "cpu", "token": token, **variables}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "faasmoe_expert"],
            env=sandbox_env(**settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = _address(process, log)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(
            base_url=f"http://{address}", headers=headers, timeout=DEADLINE_S, trust_env=False
        ) as http:
            assert http.get("/readyz").status_code == 200
            yield SandboxProcess(address, process, http, log)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end_s = time.monotonic() + DEADLINE_S
    while True:
        text = log.read_text(errors="replace")
        found = _LISTENS.search(text)
        if found:
            return found[1]
        assert process.poll() is None, f"the sandbox ended: {text}"
        assert time.monotonic() < end_s, f"the sandbox did not listen in time: {text}"
        time.sleep(0.02)
