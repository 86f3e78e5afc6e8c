"""Executes the calls of one layer: by sandboxes, after activation, or in this process.

No fault of a sandbox or the network leaves this module as an error. In order, a group is

1. computed in this process if its function is colocated (colocation.py), or has no address while
   memory is limited (overflow.py),
2. called at the function's addresses, with retries and hedges (fanout.py, retry_policy.py),
3. held back and retried while its function is being activated, its sandbox is starting or an
   ejected replica may be replaced (cold_start.py),
4. computed from the store (local_functions.py), and in the next passes natively (takeover.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Self

from faasmoe_contracts.routing_table import FunctionEndpoints
from faasmoe_contracts.store import Store
from faasmoe_contracts.tls import TlsPeer
from faasmoe_router.dispatch.cold_start import (
    AbsenceTracker,
    ActivationSettings,
    ActivationWaiter,
    CallFailures,
)
from faasmoe_router.dispatch.colocation import ColocatedFunctions
from faasmoe_router.dispatch.endpoint_health import EndpointHealth, ResilienceSettings
from faasmoe_router.dispatch.fanout import DispatchTimeouts, Fanout, OverlappedWork
from faasmoe_router.dispatch.layer_batch import LayerBatch
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local_functions import LocalFunctions
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.overflow import OverflowFunctions
from faasmoe_router.dispatch.retry_policy import RateLimitedLogger, RetryHedgePolicy
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.dispatch.takeover import TakenOverFunctions
from faasmoe_router.errors import StoreCorrupted


class LayerExecutor:
    """Executes layers; belongs to the engine's thread, except for `set_routing`.

    Args:
        store: the prepared model; local fallback computes from it.
        routing: the initial routing.
        fanout: makes the calls.
        metrics: the dispatcher's metrics.
        activation: how calls wait for functions that are being activated; None if they never do.
        timeouts: bounds of a layer's calls.
        resilience: how failed and slow calls are handled.
        colocated: functions that may be computed in this process; None for none.
        overflow: computes the functions without an address, so that no call waits for one; None
            where calls wait.
        tls: how sandboxes are known; None probes them without TLS.

    Attributes:
        routing: the current routing; one read of it is consistent.
        load: how much each function is called; any thread may read it.
        health: health and latency of addresses.
        taken_over: the functions that go on natively in this process without their sandboxes.
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
        overflow: OverflowFunctions | None = None,
        tls: TlsPeer | None = None,
    ) -> None:
        self.routing = routing
        self.load = LoadMeter()
        self._fanout = fanout
        self._metrics = metrics
        self._local_functions = LocalFunctions(store)
        if colocated is not None:
            self._local_functions = LocalFunctions(store, find=colocated.find)
        self._colocated = colocated
        self._overflow = overflow
        self._round_robin_indices: dict[int, int] = defaultdict(int)  # by layer
        self.health = EndpointHealth(
            resilience or ResilienceSettings(),
            metrics,
            may_be_starting=activation is not None,
            tls=tls,
        )
        self._activation_waiter: ActivationWaiter | None = None
        if activation is not None:
            self._activation_waiter = ActivationWaiter(
                activation, health=self.health, load=self.load, metrics=metrics
            )
        waiter = self._activation_waiter
        self._request = (
            _request_none if waiter is None or overflow is not None else waiter.request_replacements
        )
        self.taken_over = TakenOverFunctions(
            self._local_functions,
            health=self.health,
            was_lost=_never_lost if waiter is None else waiter.was_lost,
            wait_s=0.0 if activation is None else activation.replacement_timeout_s,
            request=self._request,
        )
        self._layer_timeout_s = (timeouts or DispatchTimeouts()).layer_timeout_s
        self._failure_logger = RateLimitedLogger()
        self._applied_routing = routing

    @property
    def absences(self) -> AbsenceTracker | None:
        """The functions that calls found missing; None if calls never wait."""
        return None if self._activation_waiter is None else self._activation_waiter.absences

    def start_pass(self, n_rows: int) -> None:
        """Start a forward pass of `n_rows` rows, before its first layer."""
        self.apply_routing()
        now_s = time.monotonic()
        self.health.run_health_checks(now_s)
        self.load.forward_passes += 1
        if self._colocated is not None:
            self._colocated.start_pass(self.routing, n_rows, now_s)
            self._request(self.routing, [spec.id for spec in self._colocated.lost], now_s)
        if self._overflow is not None:
            self._overflow.start_pass(self.routing)

    def execute(
        self,
        batch: LayerBatch,
        layer: int,
        functions: Sequence[FunctionEndpoints],
        *,
        while_waiting: OverlappedWork | None = None,
    ) -> None:
        """Add an output of every group to the batch.

        Args:
            batch: the layer's groups, and the reducer of their outputs.
            layer: index of the MoE layer.
            functions: the layer's functions that the batch was grouped by.
            while_waiting: work to do once, while the first calls are in flight.

        Raises:
            StoreUnreadable: local fallback is needed, and the store lacks the function.
            StoreCorrupted: local fallback is needed, and the function's bytes fail verification.
        """
        self.apply_routing()
        self.health.run_health_checks(time.monotonic())
        started_s = time.monotonic()
        deadline_s = started_s + self._layer_timeout_s
        entries = {i: functions[group.function_index] for i, group in enumerate(batch.groups)}
        colocated = self._select_colocated(batch, layer, functions)
        overflow = self._select_overflow(entries)
        local = {*colocated, *overflow}
        remote = {i: entry for i, entry in entries.items() if i not in local}
        with InFlightTracker(self.load, batch, entries) as in_flight:
            round_robin_index = self._round_robin_indices[layer]
            self._round_robin_indices[layer] += 1
            corrupted: list[int] = []

            def do_overlapped_work() -> None:
                if while_waiting is not None:
                    while_waiting()
                corrupted.extend(self._compute_colocated(batch, colocated, entries, in_flight))
                self._compute_overflow(batch, overflow, entries, in_flight)

            has_work = while_waiting is not None or bool(local)
            failures = self._call_functions(
                batch,
                remote,
                in_flight,
                round_robin_index,
                deadline_s,
                do_overlapped_work if has_work else None,
            )
            if corrupted:
                retried = {i: entries[i] for i in corrupted}
                failures |= self._call_functions(
                    batch, retried, in_flight, round_robin_index, deadline_s
                )
            for i in self._wait_for_activation(batch, entries, failures, in_flight, deadline_s):
                self._count_local()
                batch.compute_locally(i, self._local_functions, entries[i].spec)
        if self._colocated is not None:
            elapsed_s = time.monotonic() - started_s
            self._colocated.finish_layer(
                layer, elapsed_s, is_valid_sample=not failures and not corrupted
            )

    def _count_local(self) -> None:
        """Count a computation in place of a sandbox."""
        self._metrics.local.inc()
        self.load.local_calls += 1

    def _select_colocated(
        self, batch: LayerBatch, layer: int, functions: Sequence[FunctionEndpoints]
    ) -> Collection[int]:
        """Return the positions to compute in this process."""
        if self._colocated is None:
            return ()
        return self._colocated.select_positions(layer, batch.groups, functions)

    def _select_overflow(self, entries: Mapping[int, FunctionEndpoints]) -> Collection[int]:
        """Return the positions whose function has no place in limited memory."""
        if self._overflow is None:
            return ()
        return [i for i, entry in entries.items() if not entry.addresses]

    def _compute_overflow(
        self,
        batch: LayerBatch,
        positions: Collection[int],
        entries: Mapping[int, FunctionEndpoints],
        in_flight: InFlightTracker,
    ) -> None:
        for i in positions:
            assert self._overflow is not None
            batch.compute_locally(i, self._overflow, entries[i].spec)
            self._metrics.colocated.inc()
            in_flight.finish(i)

    def _compute_colocated(
        self,
        batch: LayerBatch,
        positions: Collection[int],
        entries: Mapping[int, FunctionEndpoints],
        in_flight: InFlightTracker,
    ) -> list[int]:
        """Compute these positions in this process; return those to call instead."""
        corrupted = []
        for i in positions:
            assert self._colocated is not None
            try:
                batch.compute_locally(i, self._colocated, entries[i].spec)
            except StoreCorrupted:  # a sandbox may still hold intact bytes
                corrupted.append(i)
                continue
            if entries[i].addresses:
                self._metrics.colocated.inc()
                if self.absences is not None:
                    self.absences.record_found(entries[i].spec.id)
            else:
                self._count_local()
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
        """Call the functions of these positions; return the failed ones."""

        def handle_response(position: int, frame: memoryview) -> None:
            batch.add_response(position, frame)
            self._metrics.received_bytes.inc(len(frame))
            in_flight.finish(position)

        retry_policy = RetryHedgePolicy(
            entries,
            lambda position: len(batch.groups[position].rows),
            health=self.health,
            metrics=self._metrics,
            failure_logger=self._failure_logger,
            round_robin_index=round_robin_index,
        )
        first_attempts = {i: retry_policy.first_attempt(i, batch.request_frame) for i in entries}
        calls = {i: call for i, call in first_attempts.items() if call is not None}
        self.health.retry_budget.deposit(len(calls))
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
        """Wait for failed positions to become available; return those that did not."""
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

    def set_routing(self, routing: RoutingIndex) -> None:
        """Use another routing for all further calls, waiting ones included; from any thread."""
        self.routing = routing
        self._fanout.retain(routing.addresses())
        if self._colocated is not None:
            self._colocated.release_unassigned(routing, time.monotonic())
        if self._overflow is not None:
            self._overflow.release(routing)
        if self._activation_waiter is not None:
            self._activation_waiter.routing_changed.set()

    def release_memory(self) -> None:
        """Unmap what was computed in place of sandboxes, when idle; safe from any thread."""
        self._local_functions.release()
        if self._colocated is not None:
            self._colocated.release_lost()

    def apply_routing(self) -> None:
        """Drop the state of addresses and functions that left the routing, if that changed."""
        routing = self.routing
        if routing is not self._applied_routing:
            addresses = routing.addresses()
            self.health.retain(addresses)
            self._failure_logger.retain(addresses)
            if self._activation_waiter is not None:
                self._activation_waiter.record_routing(
                    self._applied_routing, routing, time.monotonic()
                )
            self._applied_routing = routing

    def close(self) -> None:
        """Stop background threads."""
        self.health.close()
        if self._colocated is not None:
            self._colocated.close()
        if self._overflow is not None:
            self._overflow.close()


def _never_lost(function_id: str, now_s: float) -> bool:
    return False


def _request_none(routing: RoutingIndex, function_ids: Iterable[str], now_s: float) -> None:
    """Request nothing, where functions are not activated or have no place in memory."""


class InFlightTracker:
    """Records a batch's calls in the load meter; each is in flight until its output is added."""

    def __init__(
        self, load: LoadMeter, batch: LayerBatch, entries: Mapping[int, FunctionEndpoints]
    ) -> None:
        self._load = load
        self._batch = batch
        self._function_ids = {i: entry.spec.id for i, entry in entries.items()}

    def __enter__(self) -> Self:
        """Record the start of all calls."""
        now_s = time.monotonic()
        for i, function_id in self._function_ids.items():
            self._load.record_start(function_id, now_s, rows=len(self._batch.groups[i].rows))
        return self

    def finish(self, position: int) -> None:
        """Record the end of the call at `position`."""
        self._load.record_end(self._function_ids.pop(position), time.monotonic())

    def __exit__(self, *_: object) -> None:
        """Record the end of all calls that are still open."""
        for position in list(self._function_ids):
            self.finish(position)
