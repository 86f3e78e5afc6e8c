"""Measures what TLS costs a router's calls of functions over TCP, on both sides.

`python -m benchmarks.tls [--quick] [--out FOLDER]`, `make bench-tls`.

Two sandbox processes hold the same small function, one of them with TLS; this process calls them in
turns as a router does (`Fanout`), over connections that are kept. CPU time is that of this process
and of the sandbox; the function's own products are in both. `connect` is a call of one row on a new
connection. Unix sockets and mailboxes, which sandboxes of the router's own machine have, never use
TLS (`make bench-call` measures them). Writes tls.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.geometry import CheckpointGeometry
from benchmarks.report import OUT, Spread, describe_machine, percentile, write_figures
from benchmarks.resource_usage import CpuClock
from benchmarks.static_deployment import make_model_in_subprocess

from faasmoe_contracts.routing_table import FunctionSpec, make_function_id
from faasmoe_contracts.store import Store
from faasmoe_contracts.tls import (
    AUTHORITIES_FILE,
    CERTIFICATE_FILE,
    DEFAULT_NAMESPACE,
    KEY_FILE,
    OPERATOR_NAME,
    TlsFolder,
    TlsPeer,
    models_name,
)
from faasmoe_contracts.wire import Buffer, Dtype, OutputMode, encode_request
from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient
from faasmoe_operator.kube.certificates import issue_certificate
from faasmoe_router.dispatch.fanout import DispatchTimeouts, Fanout
from faasmoe_router.dispatch.transport import Call

GEOMETRY = CheckpointGeometry(
    layers=1, vocabulary=512, hidden=1024, heads=8, intermediate=16, shared_intermediate=64
)
ROWS = (1, 4, 16, 64, 256)
TRANSPORTS = ("plain", "tls")
TOKEN = "bench"
START_TIMEOUT_S = 120.0
PATIENT = DispatchTimeouts(60, 60, 60)
_LISTENS = re.compile(r"listening on ([\d.]+:\d+)")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A running sandbox with the function.

    Attributes:
        address: host:port.
        pid: its process.
        tls: how a router knows it; None without TLS.
    """

    address: str
    pid: int
    tls: TlsPeer | None


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call, in milliseconds: CPU time of each side, and the median time."""

    router_ms: float
    sandbox_ms: float
    p50_ms: float


def write_certificate(folder: Path, name: str) -> TlsFolder:
    """Write a certificate of this name, of an authority for this run."""
    issued = issue_certificate(b"benchmark" * 4, name, [name], time.time())
    folder.mkdir()
    (folder / CERTIFICATE_FILE).write_bytes(issued.certificate)
    (folder / KEY_FILE).write_bytes(issued.key)
    (folder / AUTHORITIES_FILE).write_bytes(issued.authorities)
    return TlsFolder(folder)


@contextmanager
def running_sandbox(
    folder: Path, store: Store, spec: FunctionSpec, *, has_tls: bool
) -> Iterator[Sandbox]:
    """Run a sandbox with the function attached for the lifetime of the context."""
    name = models_name(DEFAULT_NAMESPACE)
    folder.mkdir()
    settings = {"PORT": "0", "DEVICE": "cpu", "TOKEN": TOKEN, "DRAIN_S": "0"}
    tls = operator = None
    if has_tls:
        write_certificate(folder / "sandbox", name)
        settings["TLS_FOLDER"] = str(folder / "sandbox")
        tls = TlsPeer(write_certificate(folder / "router", name), name)
        operator = TlsPeer(write_certificate(folder / "operator", OPERATOR_NAME), name)
    environment = {**os.environ, **{f"FAASMOE_{n}": value for n, value in settings.items()}}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "faasmoe_expert"], env=environment, stderr=output
        )
    try:
        address = _wait_for_address(process, log)
        asyncio.run(_attach(address, store, spec, operator))
        yield Sandbox(address, process.pid, tls)
    finally:
        process.terminate()
        process.wait()


def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s and process.poll() is None:
        if match := _LISTENS.search(log.read_text()):
            return match[1]
        time.sleep(0.05)
    raise RuntimeError(f"the sandbox does not listen: {log.read_text()}")


async def _attach(address: str, store: Store, spec: FunctionSpec, operator: TlsPeer | None) -> None:
    async with SandboxClient(token=TOKEN, tls=operator) as client:
        found = ModelStore(store.path, store.manifest.digest)
        await client.attach(address, spec, store=found)


def make_frame(n_rows: int) -> list[Buffer]:
    """Return a frame of random rows, each for one expert."""
    random = np.random.default_rng(n_rows)
    rows = random.standard_normal((n_rows, GEOMETRY.hidden), dtype=np.float32)  # [T, H]
    return encode_request(
        rows.tobytes(),
        dtype=Dtype.FLOAT32,
        mode=OutputMode.REDUCED,
        layer=0,
        hidden_size=GEOMETRY.hidden,
        n_rows=n_rows,
        pair_row=np.arange(n_rows, dtype=np.int32),
        pair_expert=np.zeros(n_rows, dtype=np.int32),
        pair_weight=np.ones(n_rows, dtype=np.float32),
    )


def measure_calls(
    sandbox: Sandbox, fanout: Fanout, call: Call, n_calls: int, before: Callable[[], None]
) -> Cost:
    """Make calls one after the other; return the cost of one.

    Args:
        sandbox: the sandbox.
        fanout: makes the calls.
        call: the call.
        n_calls: how many.
        before: called before each.
    """
    clock, times_ms = CpuClock([sandbox.pid]), []
    router_s, sandbox_s = time.process_time(), clock.read_s()
    for _ in range(n_calls):
        before()
        start_s = time.perf_counter()
        if errors := fanout.run([call], lambda *_: None):
            raise RuntimeError(f"a call failed: {errors[0]}")
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    router_s, sandbox_s = time.process_time() - router_s, clock.read_s() - sandbox_s
    return Cost(router_s * 1e3 / n_calls, sandbox_s * 1e3 / n_calls, percentile(times_ms, 50))


def measure(
    sandboxes: Mapping[str, Sandbox], function_id: str, *, rounds: int, n_calls: int
) -> dict[str, dict[str, list[Cost]]]:
    """Measure both transports in turns; return the costs of each round by transport and call.

    A call is named by its rows; `connect` is one of a row on a new connection.
    """
    names = [*map(str, ROWS), "connect"]
    costs: dict[str, dict[str, list[Cost]]] = {t: {n: [] for n in names} for t in sandboxes}
    with ExitStack() as stack:
        fanouts = {
            transport: stack.enter_context(
                closing(Fanout(token=TOKEN, timeouts=PATIENT, tls=sandbox.tls))
            )
            for transport, sandbox in sandboxes.items()
        }
        for _ in range(rounds):
            for name in names:
                for transport, sandbox in sandboxes.items():
                    fanout, is_new = fanouts[transport], name == "connect"
                    n_rows = 1 if is_new else int(name)
                    call = Call(sandbox.address, function_id, make_frame(n_rows))
                    measure_calls(sandbox, fanout, call, 5, lambda: None)
                    before = partial(_drop, fanout, sandbox.address) if is_new else _nothing
                    n = n_calls // 4 if is_new else n_calls
                    costs[transport][name].append(measure_calls(sandbox, fanout, call, n, before))
    return costs


def _drop(fanout: Fanout, address: str) -> None:
    """Close all connections."""
    fanout.retain(())
    fanout.retain([address])


def _nothing() -> None:
    return


def figures(costs: Mapping[str, Mapping[str, Sequence[Cost]]]) -> dict[str, Any]:
    """Return the figures to write: medians over the rounds with their spread."""
    result: dict[str, Any] = {"frame_bytes": {}, "calls": {}, "added_cpu_ms": {}}
    for n_rows in ROWS:
        size_bytes = sum(memoryview(part).nbytes for part in make_frame(n_rows))
        result["frame_bytes"][str(n_rows)] = size_bytes
    for transport, by_call in costs.items():
        result["calls"][transport] = {
            name: {
                field: Spread.from_values([getattr(cost, field) for cost in found])
                for field in Cost.__slots__
            }
            for name, found in by_call.items()
        }
    for name in costs["plain"]:
        result["added_cpu_ms"][name] = Spread.from_values(
            [
                _cpu_ms(tls) - _cpu_ms(plain)
                for tls, plain in zip(costs["tls"][name], costs["plain"][name], strict=True)
            ]
        )
    return result


def _cpu_ms(cost: Cost) -> float:
    return cost.router_ms + cost.sandbox_ms


def print_table(result: Mapping[str, Any]) -> None:
    """Print one line per transport and call."""
    lines = [
        (transport, name, *(found[c].format(3) for c in Cost.__slots__))
        for transport, by_call in result["calls"].items()
        for name, found in by_call.items()
    ]
    print(format_table(("TRANSPORT", "ROWS", *(c.upper() for c in Cost.__slots__)), lines))
    added = [(name, spread.format(3)) for name, spread in result["added_cpu_ms"].items()]
    print(format_table(("ROWS", "CPU ADDED BY TLS, MS"), added))


def main() -> None:
    """Parse the command line, measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few calls")
    parser.add_argument("--cache", type=Path, default=OUT / "models", help="folder of the model")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of tls.json")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    _, path = asyncio.run(make_model_in_subprocess(GEOMETRY, options.cache))
    store, experts = Store.open(path), (0, 1)
    digest = store.manifest.digest
    name = make_function_id(b"bench", model_digest=digest, layers=[0], experts=experts)
    spec = FunctionSpec(name, (0,), experts)
    with tempfile.TemporaryDirectory(prefix="faasmoe-tls-") as folder, ExitStack() as stack:
        sandboxes = {
            transport: stack.enter_context(
                running_sandbox(Path(folder) / transport, store, spec, has_tls=transport == "tls")
            )
            for transport in TRANSPORTS
        }
        rounds, n_calls = (1, 20) if options.quick else (7, 400)
        result = figures(measure(sandboxes, name, rounds=rounds, n_calls=n_calls))
    print_table(result)
    print(write_figures("tls", {"machine": machine, **result}, folder=options.out))


if __name__ == "__main__":
    main()
