"""What a model's functions hold of a machine's memory, and how they make room for others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from faasmoe_operator.control.executor import ActionExecutor
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.function_stats import FunctionStats
from faasmoe_operator.control.model import SANDBOX_SHARE_BYTES, ControlledModel
from faasmoe_operator.plan.actions import ActionReason, Delete, Detach
from faasmoe_operator.plan.fleet import AssignmentState, MemoryHolder, SandboxState
from faasmoe_operator.plan.memory_budget import function_holders


@dataclass(slots=True)
class FunctionMemory:
    """A model's functions as the memory limit sees them; a `MemoryMember`.

    Attributes:
        model: the model.
        fleet: its sandboxes.
        stats: when its functions were used.
        executor: detaches functions and deletes sandboxes.
        clock: monotonic time in seconds.
        scale_to_zero: desires none of some functions before their idle time is over.
        publish: publishes the routing table.
        request_reconcile: plans anew soon, as memory may have become free.
        n_sharing: returns how many models share their sandboxes' processes at present.
    """

    model: ControlledModel
    fleet: Fleet
    stats: FunctionStats
    executor: ActionExecutor
    clock: Callable[[], float]
    scale_to_zero: Callable[[Collection[str]], None]
    publish: Callable[[], None]
    request_reconcile: Callable[[], None]
    n_sharing: Callable[[], int] = lambda: 1
    _versions: tuple[int, int, int] = (-1, -1, -1)
    _holders: tuple[MemoryHolder, ...] = ()
    _held_state: tuple[int, int] = (-1, -1)
    _held_bytes: int = 0

    def functions_to_warm(self) -> Collection[str]:
        """Return the functions that a router that starts will call: those that were used lately."""
        return self.stats.recently_used(self.clock()) or self.model.functions

    def memory_holders(self) -> Sequence[MemoryHolder]:
        """Return what the functions hold, with their parts of what their sandboxes do.

        The same object until something changes, as others ask for it often.
        """
        versions = (self.fleet.version, self.stats.version, self.private_bytes)
        if versions != self._versions:
            self._versions, self._holders = versions, tuple(self._observed())
        return self._holders

    def _observed(self) -> Iterator[MemoryHolder]:
        functions, private_bytes = self.model.functions, self.private_bytes
        pinned = (n for n, f in functions.items() if f.scaling.min_scale > 0)
        snapshot = self.fleet.snapshot(last_used=self.stats.last_used())
        for holder in function_holders(snapshot, pinned=pinned):
            if (function := functions.get(holder.name)) is None:
                yield holder  # a function of an earlier plan
                continue
            yield MemoryHolder(
                holder.key,
                function.size_bytes + private_bytes,
                holder.last_used,
                is_evictable=holder.is_evictable,
                is_leaving=holder.is_leaving,
                is_pinned=holder.is_pinned,
                content=function.content,
                private_bytes=private_bytes,
            )

    @property
    def private_bytes(self) -> int:
        """A function's part of a sandbox's own memory.

        Of a process that models share, each counts what it adds, and its part of the rest. That is
        among 1, 2, 4, 8, … models, so that it seldom changes: rather too much than too little.
        """
        share_bytes = min(SANDBOX_SHARE_BYTES, self.model.sandbox_bytes)
        n_parts = 1 << (max(1, self.n_sharing()).bit_length() - 1)
        sandbox_bytes = share_bytes + (self.model.sandbox_bytes - share_bytes) // n_parts
        return sandbox_bytes // self.model.template.capacity

    def held_bytes(self) -> int:
        """Return the memory of the functions in sandboxes, whether others map the same or not.

        Summed once for each state, as others ask for it often.
        """
        state = (self.fleet.version, self.private_bytes)
        if state != self._held_state:
            self._held_state, self._held_bytes = state, self._sum_held(self.private_bytes)
        return self._held_bytes

    def _sum_held(self, private_bytes: int) -> int:
        functions = self.model.functions
        return sum(
            functions[name].size_bytes + private_bytes
            for record in self.fleet.sandboxes
            for name in record.functions
            if name in functions
        )

    def missing_bytes(self, resident: Collection[str]) -> int:
        """Return the memory that the functions to warm would take that are not there.

        Args:
            resident: contents that are held already.
        """
        present = {name for record in self.fleet.sandboxes for name in record.functions}
        missing = (self.model.functions[n] for n in self.functions_to_warm() if n not in present)
        private_bytes = self.private_bytes
        return sum(
            private_bytes + (0 if function.content in resident else function.size_bytes)
            for function in missing
        )

    def resident_functions(self, contents: Collection[str]) -> frozenset[str]:
        """Return the functions whose memory is held already, as these contents are."""
        return frozenset(n for n, f in self.model.functions.items() if f.content in contents)

    def evict(self, holder: MemoryHolder) -> None:
        """Detach a function to make room for another model or a router."""
        sandbox, function = holder.key
        record = self.fleet.get(sandbox)
        if record is None or record.functions.get(function) is not AssignmentState.ATTACHED:
            return
        detach = Detach(sandbox, function, ActionReason.MEMORY)
        self.executor.execute(detach, drain_s=0.0 if holder.is_idle else None)
        self.publish()

    def release(self) -> None:
        """Let all functions go that may be evicted, as the model's last router makes room.

        Nobody calls them any more, so whole sandboxes end at once.
        """
        evictable = {n for n, f in self.model.functions.items() if f.scaling.min_scale == 0}
        self.scale_to_zero(evictable)
        for record in list(self.fleet.sandboxes):
            if record.state is not SandboxState.READY or not record.functions:
                continue  # the plan deletes those without functions
            if record.functions.keys() <= record.attached & evictable:
                self.executor.execute(Delete(record.sandbox.id, ActionReason.MEMORY))
                continue
            for function in record.attached & evictable:
                detach = Detach(record.sandbox.id, function, ActionReason.MEMORY)
                self.executor.execute(detach, drain_s=0.0)
        self.publish()
