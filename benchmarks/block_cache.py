"""How fast a function becomes active on a node that does not have its store.

`python -m benchmarks.block_cache` serves a store of one layer of 20 experts (346 MB, bfloat16) with
`python -m faasmoe_expert.blocks`, and times attaches in sandboxes: with the store at its path, with
an empty cache, and with the function in the cache. The server is in a network namespace of its own,
behind a link that `tc` limits to 10 Gbit/s; that needs root. Without it the server limits itself to
the same rate on loopback. Both share this machine's cores, which two nodes would not; the CPU time
of each, the kernel's for it included, tells what they would take alone. Writes
`benchmarks/out/block_cache.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evaluation.options import CACHE
from benchmarks.geometry import CheckpointGeometry, make_checkpoint
from benchmarks.report import OUT, Spread, describe_machine, write_figures
from benchmarks.resource_usage import CpuClock

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.store import Store

GEOMETRY = CheckpointGeometry(1, 512, experts=20, top_k=4, shared_intermediate=64)
NAMESPACE = "faasmoe-bench"
LINK = ("faasmoe-b0", "faasmoe-b1")
ADDRESSES = ("10.213.77.1", "10.213.77.2")  # of this machine, of the server
LINK_BITS_PER_S = 10_000_000_000
SERVER_PORT = 9092
SANDBOX_PORT = 9190
TOKEN = "benchmark"
FUNCTION = "measured"
TIMEOUT_S = 120.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Network:
    """How the sandbox reaches the server.

    Attributes:
        name: `namespace` or `loopback`.
        server_host: the server's address.
        prefix: what the server's command begins with.
        bytes_per_s: rate that the server limits itself to; None where the link does.
    """

    name: str
    server_host: str
    prefix: tuple[str, ...] = ()
    bytes_per_s: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block_cache", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--loopback", action="store_true", help="make no network namespace")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    machine = describe_machine()
    store = prepare_store()
    with (
        network(is_loopback=arguments.loopback) as link,
        running_server(store, link) as server_cpu,
    ):
        rounds = [measure_round(store, link, server_cpu) for _ in range(arguments.rounds)]
    figures = {"machine": machine, "network": link.name, **summarize(store, rounds)}
    print(json.dumps({k: v for k, v in figures.items() if k != "machine"}, default=str, indent=2))
    print(write_figures("block_cache", figures, folder=arguments.out))
    return 0


def prepare_store() -> Store:
    """Prepare the store, unless it is there; the checkpoint is removed."""
    folder = CACHE / f"{GEOMETRY.name}-blocks"
    if not (folder / "manifest.json").exists():
        from faasmoe_router.checkpoint.prepare import prepare

        checkpoint = CACHE / GEOMETRY.name
        make_checkpoint(GEOMETRY, checkpoint)
        prepare(str(checkpoint), folder)
        shutil.rmtree(checkpoint)
    return Store.open(folder)


@contextlib.contextmanager
def network(*, is_loopback: bool) -> Iterator[Network]:
    """Make a namespace behind a limited link, if this process may, and remove it at the end."""
    if is_loopback or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        yield Network("loopback", "127.0.0.1", bytes_per_s=LINK_BITS_PER_S // 8)
        return
    here, there = LINK
    inside = ("ip", "netns", "exec", NAMESPACE)
    shaping = ("root", "tbf", "rate", str(LINK_BITS_PER_S), "burst", "1mb", "latency", "5ms")
    _run("ip", "netns", "add", NAMESPACE)
    try:
        _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", NAMESPACE)
        _run("ip", "addr", "add", f"{ADDRESSES[0]}/30", "dev", here)
        _run("ip", "link", "set", here, "up")
        _run(*inside, "ip", "addr", "add", f"{ADDRESSES[1]}/30", "dev", there)
        _run(*inside, "ip", "link", "set", there, "up")
        _run("tc", "qdisc", "add", "dev", here, *shaping)
        _run(*inside, "tc", "qdisc", "add", "dev", there, *shaping)
        yield Network("namespace", ADDRESSES[1], inside)
    finally:
        _run("ip", "netns", "del", NAMESPACE)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextlib.contextmanager
def running_server(store: Store, link: Network) -> Iterator[CpuClock]:
    """Serve the store's blocks; yields the server's CPU time."""
    settings: dict[str, object] = {
        "STORE": store.path,
        "HOST": link.server_host,
        "PORT": SERVER_PORT,
        "TOKEN": TOKEN,
    }
    if link.bytes_per_s is not None:
        settings["BYTES_PER_SECOND"] = link.bytes_per_s
    command = [*link.prefix, sys.executable, "-m", "faasmoe_expert.blocks"]
    with _running(command, settings, f"http://{link.server_host}:{SERVER_PORT}/healthz") as cpu:
        yield cpu


@contextlib.contextmanager
def running_sandbox(**settings: object) -> Iterator[CpuClock]:
    """Run a sandbox with these settings; yields its CPU time."""
    command = [sys.executable, "-m", "faasmoe_expert"]
    common = {"PORT": SANDBOX_PORT, "TOKEN": TOKEN, "DEVICE": "cpu", "DRAIN_S": 0, "CAPACITY": 2}
    with _running(command, common | settings, f"http://127.0.0.1:{SANDBOX_PORT}/readyz") as cpu:
        yield cpu


@contextlib.contextmanager
def _running(
    command: Sequence[str], settings: dict[str, object], ready_url: str
) -> Iterator[CpuClock]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    env |= {f"FAASMOE_{name}": str(value) for name, value in settings.items()}
    with subprocess.Popen(command, env=env | {PARENT_PID_ENV: str(os.getpid())}) as process:
        try:
            _wait_until_ready(process, ready_url)
            yield CpuClock([process.pid])
        finally:
            process.terminate()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=TIMEOUT_S).close()
            return
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"{url}: got no answer, expected a running server")
        time.sleep(POLL_S)


def measure_round(store: Store, link: Network, server_cpu: CpuClock) -> dict[str, float]:
    """Return the seconds of an attach in each case, and the CPU time of fetching."""
    with running_sandbox():
        attach(store, str(store.path))  # reads the store into the page cache
        detach()
        local_s = attach(store, str(store.path))
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        peers = f"http://{link.server_host}:{SERVER_PORT}"
        with running_sandbox(STORE_PEERS=peers, CACHE_DIR=f"{folder}/blocks") as sandbox_cpu:
            clocks = {"fetch_cpu_s": sandbox_cpu, "serve_cpu_s": server_cpu}
            before = {name: clock.read_s() for name, clock in clocks.items()}
            fetched_s = attach(store, "/nowhere/store")
            used = {name: clock.read_s() - before[name] for name, clock in clocks.items()}
            detach()
            cached_s = attach(store, "/nowhere/store")
    return {"local_s": local_s, "fetched_s": fetched_s, "cached_s": cached_s, **used}


def attach(store: Store, path: str) -> float:
    """Attach all experts of the layer; return the seconds until the sandbox says that it has."""
    body = {
        "store": path,
        "model_digest": store.manifest.digest,
        "layers": [0],
        "experts": list(range(GEOMETRY.experts)),
    }
    started_s = time.perf_counter()
    _call("PUT", body)
    return time.perf_counter() - started_s


def detach() -> None:
    """Detach the function."""
    _call("DELETE", None)


def _call(method: str, body: dict[str, Any] | None) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{SANDBOX_PORT}/v1/functions/{FUNCTION}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method}: {error.code} {error.read().decode()}") from error


def summarize(store: Store, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return spreads, and how long the bytes alone take at the link's rate."""
    layer = store.manifest.layers[0]
    size_bytes = layer.expert_bytes * layer.num_experts + layer.shared_bytes
    wire_s = size_bytes * 8 / LINK_BITS_PER_S
    return {
        "function_bytes": size_bytes,
        "link_bits_per_s": LINK_BITS_PER_S,
        "wire_s": wire_s,
        "rounds": len(rounds),
        **{name: Spread.from_values([r[name] for r in rounds]) for name in rounds[0]},
        "fetched_over_wire": Spread.from_values([r["fetched_s"] / wire_s for r in rounds]),
    }


if __name__ == "__main__":
    sys.exit(main())
