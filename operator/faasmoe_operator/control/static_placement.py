"""Static placement: attaches every function of a model once, without autoscaling.

For benchmarks and tests of the process platform: creates the sandboxes, waits until they are ready,
attaches the functions and returns the routing table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec, RoutingTable
from faasmoe_operator.aio import gather_limited
from faasmoe_operator.control.sandbox_client import ModelStore
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.base import Platform, ProcessSandboxTemplate, Sandbox

READY_TIMEOUT_S = 120.0
PARALLEL_CALLS = 8


class FunctionAttacher(Protocol):
    """Attaches functions; implemented by `SandboxClient`."""

    async def attach(self, address: str, function: FunctionSpec, *, store: ModelStore) -> None:
        """Attach a function to the sandbox at an address."""
        ...


@dataclass(frozen=True, slots=True)
class StaticPlacement:
    """Attached functions and their sandboxes.

    Attributes:
        functions: every function of the model, in the order of the plan.
        sandboxes: each sandbox with its functions.
    """

    functions: tuple[FunctionSpec, ...]
    sandboxes: tuple[tuple[Sandbox, tuple[FunctionSpec, ...]], ...]

    def routing_table(self, model_digest: str) -> RoutingTable:
        """Return the routing table for the router."""
        addresses = {
            function.id: sandbox.address
            for sandbox, functions in self.sandboxes
            for function in functions
        }
        entries = (
            FunctionEndpoints(function, (addresses[function.id],)) for function in self.functions
        )
        return RoutingTable(model_digest, 0, tuple(entries))


async def place_all_functions(
    functions: Sequence[FunctionSpec],
    platform: Platform[ProcessSandboxTemplate],
    attacher: FunctionAttacher,
    *,
    template: ProcessSandboxTemplate,
    store: ModelStore,
    progress: Callable[[str], None],
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> StaticPlacement:
    """Create sandboxes and attach every function to one of them.

    Args:
        functions: every function of the model.
        platform: runs the sandboxes.
        attacher: attaches the functions.
        template: template of the sandboxes.
        store: the store to attach from.
        progress: called with a message before each step.
        ready_timeout_s: how long the sandboxes may take to become ready.

    Raises:
        PlatformError: a sandbox could not be created, was lost or was not ready in time.
        SandboxClientError: an attach failed.
    """
    groups = spread_functions(functions, capacity=template.capacity)
    progress(f"starting {len(groups)} sandboxes for {len(functions)} functions")
    sandboxes = await gather_limited(
        groups, lambda _: platform.create(template), limit=PARALLEL_CALLS
    )
    await wait_ready(platform, [s.id for s in sandboxes], timeout_s=ready_timeout_s)

    async def attach(call: tuple[Sandbox, FunctionSpec]) -> None:
        await attacher.attach(call[0].address, call[1], store=store)

    progress(f"attaching {len(functions)} functions")
    pairs = list(zip(sandboxes, groups, strict=True))
    calls = [(sandbox, function) for sandbox, group in pairs for function in group]
    await gather_limited(calls, attach, limit=PARALLEL_CALLS)
    return StaticPlacement(tuple(functions), tuple(pairs))


def spread_functions(
    functions: Sequence[FunctionSpec], *, capacity: int
) -> tuple[tuple[FunctionSpec, ...], ...]:
    """Return the functions of each sandbox: the fewest sandboxes possible, evenly filled.

    Functions are assigned round-robin, so that the functions of one layer, which are called at the
    same time, are in different sandboxes wherever there are enough.
    """
    n_sandboxes = -(-len(functions) // capacity)
    return tuple(tuple(functions[first::n_sandboxes]) for first in range(n_sandboxes))


async def wait_ready(platform: Platform[Any], names: Collection[str], *, timeout_s: float) -> None:
    """Wait until all of these sandboxes are ready.

    Raises:
        PlatformError: a sandbox was lost, or the timeout passed.
    """
    events, waiting = platform.watch(), set(names)
    if lost := waiting - {sandbox.id for sandbox in await platform.list()}:
        raise _lost_error(min(lost), "it had already exited")
    try:
        async with asyncio.timeout(timeout_s):
            while waiting:
                event = await anext(events)
                if event.kind == "deleted" and event.sandbox.id in waiting:
                    raise _lost_error(event.sandbox.id, event.reason)
                if event.sandbox.ready:
                    waiting.discard(event.sandbox.id)
    except TimeoutError:
        raise PlatformError(
            f"{len(waiting)} of {len(names)} sandboxes were not ready after {timeout_s:g} s"
        ) from None


def _lost_error(name: str, reason: str) -> PlatformError:
    return PlatformError(f"sandbox {name} was lost before it was ready: {reason}")
