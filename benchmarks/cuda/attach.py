"""Time for a sandbox to attach and detach a function whose weights are in the page cache."""

from __future__ import annotations

import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Spread

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient
from faasmoe_operator.control.static_placement import wait_ready
from faasmoe_operator.platforms.base import ProcessSandboxTemplate
from faasmoe_operator.platforms.process import ProcessPlatform
from faasmoe_operator.platforms.zygote import run_zygote

READY_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class AttachTimes:
    """Measured times.

    Attributes:
        device: device of the sandbox.
        size_bytes: size of the function's weights.
        start_s: time from fork to a ready sandbox with an initialised device.
        first_s: time of the first attach, which verifies the weights.
        attach_s: times of later attaches.
        detach_s: times of detaches.
    """

    device: str
    size_bytes: int
    start_s: float
    first_s: float
    attach_s: Spread
    detach_s: Spread

    @property
    def gb_per_s(self) -> float:
        """Throughput of attaches after the first."""
        return self.size_bytes / self.attach_s.median / 1e9

    def to_json(self) -> dict[str, Any]:
        """Return the JSON figures."""
        names = ("device", "size_bytes", "start_s", "first_s", "attach_s", "detach_s", "gb_per_s")
        return {name: getattr(self, name) for name in names}


async def measure_attach(store: Store, *, device: str, experts: int, rounds: int) -> AttachTimes:
    """Attach and detach one function repeatedly in a new sandbox.

    Args:
        store: the store.
        device: device of the sandbox.
        experts: experts of the function.
        rounds: attaches after the first.
    """
    token = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        socket = Path(folder) / "zygote.sock"
        async with (
            run_zygote(socket, token=token, store=store.path, device=device),
            ProcessPlatform(socket=socket) as platform,
            SandboxClient(token=token) as client,
        ):
            started_s = time.perf_counter()
            sandbox = await platform.create(ProcessSandboxTemplate(device=device))
            await wait_ready(platform, [sandbox.id], timeout_s=READY_TIMEOUT_S)
            start_s = time.perf_counter() - started_s
            spec = FunctionSpec("attached", (0,), tuple(range(experts)))
            model_store = ModelStore(store.path, store.manifest.digest)
            attach_s: list[float] = []
            detach_s: list[float] = []
            for _ in range(rounds + 1):
                at_s = time.perf_counter()
                await client.attach(sandbox.address, spec, store=model_store)
                attached_s = time.perf_counter()
                attach_s.append(attached_s - at_s)
                await client.detach(sandbox.address, spec.id)
                detach_s.append(time.perf_counter() - attached_s)
    layer = store.manifest.layers[0]
    size_bytes = layer.expert_bytes * experts + layer.shared_bytes
    return AttachTimes(
        device,
        size_bytes,
        start_s,
        attach_s[0],
        Spread.from_values(attach_s[1:]),
        Spread.from_values(detach_s),
    )


def format_attach_times(times: AttachTimes) -> str:
    """Return the figures as one line."""
    return (
        f"attach of {times.size_bytes / 1e6:.0f} MB on {times.device}: "
        f"{times.attach_s.format(3)} s, {times.gb_per_s:.1f} GB/s; first attach, verifying, "
        f"{times.first_s:.3f} s; detach {times.detach_s.format(3)} s; sandbox start "
        f"{times.start_s:.2f} s"
    )
