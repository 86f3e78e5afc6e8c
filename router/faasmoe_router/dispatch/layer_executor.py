"""The calls of one batch that are in flight, on the load meter.

Getting a layer's parts: from functions, from functions that are awaited, or computed here.

Nothing that a sandbox or the network does leaves this module as an error. A call that fails is made
again at the function's other addresses (attempts.py). A function without an address is asked for
and its calls are held for a moment; so are calls to an address that does not accept connections
yet, and, for a shorter one, calls whose addresses were ejected, for a fresh replica to come. What
is left then is computed from the store. Hot functions may be computed here to begin with (hot.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self

from faasmoe_contracts.routing_table import FunctionEndpoints
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch.calls import DispatchTimeouts
from faasmoe_router.dispatch.cold_start import ActivationSettings, ActivationWaiter, CallFailures
from faasmoe_router.dispatch.colocation import ColocatedFunctions
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.layer_batch import LayerBatch
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local_functions import LocalFunctions
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.resilience import EndpointHealth, ResilienceSettings
from faasmoe_router.dispatch.retry_policy import RateLimitedLogger, RetryHedgePolicy
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreCorrupted


class InFlightTracker:
    """The load of one batch's calls: each is in flight until its part is there."""

    def __init__(
        self, load: LoadMeter, batch: LayerBatch, entries: Mapping[int, FunctionEndpoints]
    ) -> None:
        self._load = load
        self._batch = batch
        self._function_ids = {i: entry.spec.id for i, entry in entries.items()}

    def __enter__(self) -> Self:
        """Count all as begun."""
        now_s = time.monotonic()
        for i, function_id in self._function_ids.items():
            self._load.record_start(function_id, now_s, rows=len(self._batch.groups[i].rows))
        return self

    def finish(self, position: int) -> None:
        """Count the part at this position as there."""
        self._load.record_end(self._function_ids.pop(position), time.monotonic())

    def __exit__(self, *_: object) -> None:
        """Count what is still open as ended."""
        for position in list(self._function_ids):
            self.finish(position)


OverlappedWork = Callable[[], None]


class LayerExecutor:
    """Fills layers. Belongs to the engine's thread, but for `set_routing`.

    Attributes:
        routing: where each function is; one reading of it is consistent.
        load: what is called, for other threads to read.
    """

    def __init__(
        self,
        store: Store,
        routing: RoutingIndex,
        *,
        fanout: Fanout,
        metrics: DispatchMetrics,
        activation: ActivationSettings | None,
        timeouts: DispatchTimeouts | None = None,
        resilience: ResilienceSettings | None = None,
        colocated: ColocatedFunctions | None = None,
    ) -> None:
        self.routing = routing
        self.load = LoadMeter()
        self._fanout = fanout
        self._metrics = metrics
        self._local_functions = LocalFunctions(store)
        self._colocated = colocated
        self._round_robin_indices: dict[int, int] = defaultdict(
            int
        )  # by layer: spreads calls over replicas
        self._health = EndpointHealth(
            resilience or ResilienceSettings(), metrics, may_be_starting=activation is not None
        )
        self._activation_waiter: ActivationWaiter | None = None
        if activation is not None:
            self._activation_waiter = ActivationWaiter(
                activation, health=self._health, load=self.load, metrics=metrics
            )
        self._layer_timeout_s = (timeouts or DispatchTimeouts()).layer_timeout_s
        self._failure_logger = RateLimitedLogger()
        self._applied_routing = routing

    def set_routing(self, routing: RoutingIndex) -> None:
        """Let the calls from now on go elsewhere, those that are held too; from any thread."""
        self.routing = routing
        self._fanout.retain(routing.addresses())
        if self._colocated is not None:
            self._colocated.release_unassigned(routing)
        if self._activation_waiter is not None:
            self._activation_waiter.routing_changed.set()

    def execute(
        self,
        batch: LayerBatch,
        layer: int,
        functions: Sequence[FunctionEndpoints],
        *,
        while_waiting: OverlappedWork = lambda: None,
    ) -> None:
        """Get all of the batch's parts.

        Args:
            batch: what is called.
            layer: index of the MoE layer.
            functions: the layer's functions that the batch was grouped by.
            meanwhile: work to do while the first calls are away, or before others are held.
        """
        self._forget_removed()
        self._health.run_health_checks(time.monotonic())
        self.load.forward_passes += layer == 0
        started_s = time.monotonic()
        entries = {i: functions[group.function_index] for i, group in enumerate(batch.groups)}
        colocated = self._colocated_positions(batch, layer, functions)
        remote = {i: entry for i, entry in entries.items() if i not in colocated}
        with InFlightTracker(self.load, batch, entries) as in_flight:
            round_robin_index = self._round_robin_indices[layer]
            self._round_robin_indices[layer] += 1
            deadline_s = started_s + self._layer_timeout_s
            corrupted: list[int] = []

            def do_overlapped_work() -> None:
                while_waiting()
                corrupted.extend(self._compute_colocated(batch, colocated, entries, in_flight))

            work_once = _RunOnce(do_overlapped_work)
            failures = self._call_functions(
                batch, remote, in_flight, round_robin_index, deadline_s, work_once
            )
            work_once()
            if corrupted:
                retried = {i: entries[i] for i in corrupted}
                failures |= self._call_functions(
                    batch, retried, in_flight, round_robin_index, deadline_s
                )
            for i in self._wait_for_activation(batch, entries, failures, in_flight, deadline_s):
                self._metrics.local.inc()
                self.load.local_calls += 1
                batch.compute_locally(i, self._local_functions, entries[i].spec)
        if self._colocated is not None:
            elapsed_s = time.monotonic() - started_s
            self._colocated.finish_layer(
                layer, elapsed_s, is_valid_sample=not failures and not corrupted
            )

    def _colocated_positions(
        self, batch: LayerBatch, layer: int, functions: Sequence[FunctionEndpoints]
    ) -> Collection[int]:
        """Return the positions that this process computes as it takes less time."""
        if self._colocated is None:
            return ()
        if layer == 0:
            self._colocated.start_pass(self.routing, batch.n_rows)
        return self._colocated.select_positions(layer, batch.groups, functions)

    def _compute_colocated(
        self,
        batch: LayerBatch,
        positions: Collection[int],
        entries: Mapping[int, FunctionEndpoints],
        in_flight: InFlightTracker,
    ) -> list[int]:
        """Compute these positions; return those that must be called after all."""
        corrupted = []
        for i in positions:
            assert self._colocated is not None
            try:
                batch.compute_locally(i, self._colocated, entries[i].spec)
            except StoreCorrupted:  # here; a sandbox may have the right bytes
                corrupted.append(i)
                continue
            self._metrics.colocated.inc()
            in_flight.finish(i)
        return corrupted

    def _call_functions(
        self,
        batch: LayerBatch,
        entries: Mapping[int, FunctionEndpoints],
        in_flight: InFlightTracker,
        round_robin_index: int,
        deadline_s: float,
        while_waiting: OverlappedWork | None = None,
    ) -> CallFailures:
        """Call the functions of these positions; return the positions that got no part."""

        def handle_response(position: int, frame: memoryview) -> None:
            batch.add_response(position, frame)
            self._metrics.received_bytes.inc(len(frame))
            in_flight.finish(position)

        retry_policy = RetryHedgePolicy(
            entries,
            lambda position: len(batch.groups[position].rows),
            health=self._health,
            metrics=self._metrics,
            failure_logger=self._failure_logger,
            round_robin_index=round_robin_index,
        )
        first_attempts = {i: retry_policy.first_attempt(i, batch.request_frame) for i in entries}
        calls = {i: call for i, call in first_attempts.items() if call is not None}
        self._health.retry_budget.deposit(len(calls))
        errors = self._fanout.run(
            calls,
            handle_response,
            while_waiting=while_waiting,
            retry_policy=retry_policy,
            deadline_s=deadline_s,
        )
        self._metrics.calls.inc(retry_policy.n_calls)
        self._metrics.sent_bytes.inc(retry_policy.sent_bytes)
        if self._activation_waiter is not None:
            for i in calls.keys() - errors.keys():
                self._activation_waiter.absences.record_found(entries[i].spec.id)
        return {i: retry_policy.errors.get(i) for i in entries if i not in calls or i in errors}

    def _wait_for_activation(
        self,
        batch: LayerBatch,
        entries: Mapping[int, FunctionEndpoints],
        failures: CallFailures,
        in_flight: InFlightTracker,
        deadline_s: float,
    ) -> Collection[int]:
        """Have what failed wait, if anything may; return the positions that got no part."""
        if not failures or self._activation_waiter is None:
            return failures.keys()
        return self._activation_waiter.wait(
            entries,
            failures,
            n_rows=batch.n_rows,
            routing=lambda: self.routing,
            retry=lambda retried: self._call_functions(batch, retried, in_flight, 0, deadline_s),
            deadline_s=deadline_s,
        )

    def close(self) -> None:
        """End what runs beside the engine's thread."""
        self._health.close()
        if self._colocated is not None:
            self._colocated.close()

    def _forget_removed(self) -> None:
        routing = self.routing
        if routing is not self._applied_routing:
            addresses = routing.addresses()
            self._health.retain(addresses)
            self._failure_logger.retain(addresses)
            if self._activation_waiter is not None:
                self._activation_waiter.absences.retain(routing.entries)
            self._applied_routing = routing


class _RunOnce:
    """Work that is done the first time it is asked for."""

    def __init__(self, work: OverlappedWork) -> None:
        self._work: OverlappedWork | None = work

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()
