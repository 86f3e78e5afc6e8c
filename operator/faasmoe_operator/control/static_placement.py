"""Which functions share a sandbox, when all of them stay resident. Pure.

Every function in a sandbox: what `faasmoe up` runs while functions do not come and go.

Decide (plan/residency.py), act (create, wait until ready, attach), and tell the result as a
function table.
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


def spread_functions(
    functions: Sequence[FunctionSpec], *, capacity: int
) -> tuple[tuple[FunctionSpec, ...], ...]:
    """Return the functions of each sandbox: as few sandboxes as can be, evenly filled.

    Dealt out in turn, so that the blocks of one layer, which are called at the same time, come to
    different sandboxes wherever there are as many.
    """
    n_sandboxes = -(-len(functions) // capacity)
    return tuple(tuple(functions[first::n_sandboxes]) for first in range(n_sandboxes))


READY_TIMEOUT_S = 120.0
PARALLEL_CALLS = 8


class FunctionAttacher(Protocol):
    """What attaches functions; `SandboxClient` does."""

    async def attach(self, address: str, function: FunctionSpec, *, store: ModelStore) -> None:
        """Attach a function to the sandbox at an address."""
        ...


@dataclass(frozen=True, slots=True)
class StaticPlacement:
    """Functions that were made resident.

    Attributes:
        functions: every function of the model, in the plan's order.
        sandboxes: each sandbox with its functions.
    """

    functions: tuple[FunctionSpec, ...]
    sandboxes: tuple[tuple[Sandbox, tuple[FunctionSpec, ...]], ...]

    def routing_table(self, model_digest: str) -> RoutingTable:
        """Return the function table that the router reads."""
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
    """Create sandboxes and attach every function to one; raises PlatformError or SandboxError."""
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


async def wait_ready(platform: Platform[Any], names: Collection[str], *, timeout_s: float) -> None:
    """Wait until all of these sandboxes are ready; raises PlatformError if one is lost."""
    events, waiting = platform.watch(), set(names)
    if gone := waiting - {sandbox.id for sandbox in await platform.list()}:
        raise _lost_error(min(gone), "it had already exited")
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
