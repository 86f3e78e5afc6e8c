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
from typing import Any

import httpx
from tls_folders import tls_options

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.routing_table import (
    FunctionEndpoints,
    FunctionSpec,
    RoutingTable,
    make_function_id,
)
from faasmoe_contracts.store import Store
from faasmoe_contracts.tls import TlsPeer

DEADLINE_S = 300.0
"""For each answer: the first function that its family's own module computes imports transformers,
3 s of CPU time that took over 60 s on a machine with 20 other processes."""
_LISTENS = re.compile(r"listen(?:s|ing) on ([\d.]+:\d+)")


@dataclass(frozen=True, slots=True)
class SandboxProcess:
    """A running, ready sandbox.

    Attributes:
        address: host:port.
        process: the process.
        http: client with the sandbox's base URL and token.
        log: file with its output.
    """

    address: str
    process: subprocess.Popen[bytes]
    http: httpx.Client
    log: Path

    def attach(self, store: Store, spec: FunctionSpec) -> FunctionEndpoints:
        """Attach a function of a store; return its entry of a routing table."""
        body = {**spec.to_json(), "store": str(store.path), "model_digest": store.manifest.digest}
        response = self.http.put(f"/v1/functions/{spec.id}", json=body)
        assert response.status_code in (200, 201), response.text
        return FunctionEndpoints(spec, (self.address,))

    def attach_blocks(self, store: Store, experts_per_function: int) -> RoutingTable:
        """Attach all experts of a store, experts_per_function at a time; return the table."""
        entries = [self.attach(store, spec) for spec in block_specs(store, experts_per_function)]
        return RoutingTable(store.manifest.digest, 0, tuple(entries))


StartSandbox = Callable[..., AbstractContextManager[SandboxProcess]]
"""Type of the fixture `sandbox`: `sandbox(capacity=…, token=…)`; see `running_sandbox`."""
PreparedStore = Callable[..., Store]
"""Type of the fixture `prepared_store`: `prepared_store("mixtral", dtype=None)`."""


def block_specs(store: Store, experts_per_function: int) -> list[FunctionSpec]:
    """Split every MoE layer into functions of experts_per_function experts."""
    specs = []
    for layer in store.manifest.layers:
        for start in range(0, layer.num_experts, experts_per_function):
            stop = min(start + experts_per_function, layer.num_experts)
            specs.append(make_function_spec(store, [layer.index], range(start, stop)))
    return specs


def make_function_spec(store: Store, layers: Sequence[int], experts: Sequence[int]) -> FunctionSpec:
    """Return the function of the given experts in the given layers."""
    digest = store.manifest.digest
    name = make_function_id(b"tests", model_digest=digest, layers=layers, experts=experts)
    return FunctionSpec(name, tuple(layers), tuple(experts))


def sandbox_env(**variables: object) -> dict[str, str]:
    """Return the environment of a sandbox with only the given FAASMOE_* settings.

    Args:
        variables: settings in lowercase without prefix, such as capacity=4.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    env |= {f"FAASMOE_{name.upper()}": str(value) for name, value in variables.items()}
    return env | {PARENT_PID_ENV: str(os.getpid())}


@contextmanager
def running_sandbox(
    log: Path, *, token: str = "", tls: TlsPeer | None = None, **variables: object
) -> Iterator[SandboxProcess]:
    """Run a sandbox for the lifetime of the context.

    Args:
        log: file for its output.
        token: bearer token.
        tls: how `http` knows the sandbox, if it has a `tls_folder`.
        variables: further settings, such as capacity=4 for FAASMOE_CAPACITY. It waits for no client
            at its end unless drain_s says so, and its metrics are exact unless metrics_min_tokens
            says otherwise.
    """
    defaults: dict[str, object] = {"port": 0, "device": "cpu", "token": token, "drain_s": 0}
    settings = {**defaults, "metrics_min_tokens": 1, **variables}
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
        options: dict[str, Any] = tls_options(tls)
        with httpx.Client(
            base_url=f"{'http' if tls is None else 'https'}://{address}",
            headers=headers,
            timeout=DEADLINE_S,
            trust_env=False,
            **options,
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
        if match := _LISTENS.search(text):
            return match[1]
        assert process.poll() is None, f"the sandbox exited: {text}"
        assert time.monotonic() < end_s, f"the sandbox did not listen in time: {text}"
        time.sleep(0.02)
