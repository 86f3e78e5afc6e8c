"""The native path of a layer: one call to begin it and one to finish it, without Python between.

`NativeDispatch` owns the native side of calls (`faasmoe_kernels.layer_calls`) and keeps its tables
up to date with what the policies decided: routing, health, hedging thresholds, colocation. What
happened natively flows back in bulk, latencies and faults to `EndpointHealth`, counters to the load
meter and the metrics, pairs and times to colocation: after some passes, at the end of one in which
a call failed, and before a layer that takes the general path. In each layer that would take as long
as sending and receiving it.

What a sandbox does not answer in time is sent natively to other replicas, where its functions have
some. A layer that is not ordinary (a function without mailbox, an answer that is refused or that no
replica can give, many rows) takes the general path as a whole: calls are pure. One whose sandbox
was lost is computed natively again, with what that served in this process (takeover.py). Programs
that compute without Python call the functions of `program` themselves, between `start_pass` and
`finish_pass`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import HEADER_BYTES, MAX_FRAME_BYTES, PAIR_BYTES
from faasmoe_expert.functions.native_kernel import (
    DTYPES,
    MAX_DIRECT_ROWS_PER_EXPERT,
)
from faasmoe_kernels import KernelLibrary
from faasmoe_kernels.layer_calls import (
    MAX_FUNCTIONS_PER_FRAME,
    N_SIZE_CLASSES,
    CallEnd,
    CallEvent,
    CallSettings,
    CallsLeft,
    LayerCalls,
    mailbox_bytes,
)
from faasmoe_kernels.sandbox_loop import SlotStatus
from faasmoe_router.dispatch.cold_start import AbsenceTracker
from faasmoe_router.dispatch.colocation import ColocatedFunctions
from faasmoe_router.dispatch.endpoint_health import EndpointHealth
from faasmoe_router.dispatch.fanout import OverlappedWork, limit_torch_threads
from faasmoe_router.dispatch.load import LoadMeter, LoadTotals
from faasmoe_router.dispatch.local_handles import LocalHandleTable
from faasmoe_router.dispatch.mailbox_connector import N_SLOTS, MailboxConnector, MailboxSizes
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.native_routes import FunctionNumbers, Suspensions, build_routes
from faasmoe_router.dispatch.overflow import OverflowFunctions, Selection
from faasmoe_router.dispatch.retry_policy import RateLimitedLogger
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.dispatch.takeover import TakenOverFunctions
from faasmoe_router.dispatch.transport import CallError, CallTimeout, ConnectError

logger = logging.getLogger(__name__)

MAX_NATIVE_ROWS = 512
"""Larger batches are bound by their products, and split and batched by the general path."""

MIN_NATIVE_ROWS, NATIVE_REQUEST_BYTES = 64, 1 << 20
"""Rows that a mailbox holds at least, however wide, and the bytes of a frame of more rows."""

SUM_BYTES = torch.float32.itemsize
"""Of one element of an answer, which has a sum for each function and row."""

MAX_LEFT_EVENTS = 96
"""Calls that ended well and may wait to be accounted for: some passes of one token. A pass streams
through the caches, so what follows it is slow the first time, which several passes share."""

BROKEN_RETRY_S = 30.0
"""How long a sandbox whose mailbox held garbage is called over HTTP."""

NOTHING: Selection = {}
NO_SELECTIONS = (NOTHING, NOTHING, NOTHING)  # colocated, without a place in memory, taken over

SUSPENDING_STATUSES = (SlotStatus.UNKNOWN_FUNCTION, SlotStatus.FAILED, SlotStatus.BAD_FRAME)


@dataclass(frozen=True, slots=True)
class NativeProgram:
    """What a program needs to compute layers without Python; see `LayerCalls`.

    Attributes:
        context: first argument of both functions.
        begin: address of the function that begins a layer.
        finish: address of the function that finishes it.
    """

    context: int
    begin: int
    finish: int


class NativeDispatch:
    """Computes ordinary layers natively; belongs to the engine's thread.

    `set_routing`, `totals` and `release_unmapped` may be called from any thread.

    Args:
        store: the prepared model.
        library: the kernel library.
        routing: the initial routing.
        health: health and latency of addresses.
        metrics: the dispatcher's metrics.
        absences: the functions that calls found missing; None if calls never wait.
        colocated: functions that may be computed in this process; None for none.
        overflow: computes functions without an address; None where calls wait for them.
        taken_over: functions that this process computes in place of their sandboxes.
        load: counts what this process computes in place of sandboxes.
        socket_dir: folder of the Unix sockets of sandboxes on this machine.
        token: bearer token of the sandboxes.
        call_timeout_s: longest time of a call.

    Attributes:
        connector: opens the mailboxes.
        program: for programs that compute without Python.
    """

    def __init__(
        self,
        store: Store,
        library: KernelLibrary,
        routing: RoutingIndex,
        *,
        health: EndpointHealth,
        metrics: DispatchMetrics,
        absences: AbsenceTracker | None,
        colocated: ColocatedFunctions | None,
        overflow: OverflowFunctions | None,
        taken_over: TakenOverFunctions,
        load: LoadMeter,
        socket_dir: Path,
        token: str,
        call_timeout_s: float,
    ) -> None:
        self._calls = LayerCalls(library)
        self.program = NativeProgram(
            self._calls.context, self._calls.begin_address, self._calls.finish_address
        )
        self.connector = MailboxConnector(
            self._calls, mailbox_sizes(store, library), socket_dir=socket_dir, token=token
        )
        self._store_dtype = DTYPES[getattr(torch, store.manifest.model.dtype)]
        self._max_rows = max_native_rows(store)
        self._n_layers = len(store.manifest.layers)
        self._health = health
        self._metrics = metrics
        self._absences = absences
        self._colocated = colocated
        self._overflow = overflow
        self._taken_over = taken_over
        self._load = load
        self._local_selections = NO_SELECTIONS
        self._local_selection: Selection = {}
        self._call_timeout_s = call_timeout_s
        self._routing = routing
        self._numbers = FunctionNumbers()
        self._taken_numbers: frozenset[int] = frozenset()  # of the functions that are taken over
        self._n_taken_calls = 0  # of these, until they were counted last
        self._suspensions = Suspensions()
        self._failure_logger = RateLimitedLogger()
        self._locals = LocalHandleTable(self._calls)
        self._addresses: dict[int, str] = {}  # of mailboxes, also of closed ones
        self._published_routing: RoutingIndex | None = None
        self._published_state: object = None  # what else the native routes were built from
        self._mapped_routing: RoutingIndex | None = None  # of which lost functions were mapped
        self._mapped_state: object = None  # what else decided which these are
        self._n_routes: list[int] = []
        self._configured_state: object = None  # what the settings of calls were made from
        self._max_rows_per_expert = 0  # not limited until a sandbox declines
        self._totals, _ = self._calls.totals(0)
        self._metrics_lock = threading.Lock()  # guards _totals and _n_taken_calls
        metrics.windows.before_taking = self._settle_metrics
        self._before_pass = self._calls.left()
        self.set_routing(routing)

    def set_routing(self, routing: RoutingIndex) -> None:
        """Route the next passes by another table, and open the mailboxes that it needs."""
        self._routing = routing
        self.connector.want(routing.addresses())

    def start_pass(self) -> None:
        """Bring the native tables up to date; once per forward pass, before its first layer."""
        left = self._before_pass = self._calls.left()
        self._settle_if_due(left)  # what layers left that took the general path after `begin`
        self._suspensions.expire(time.monotonic())
        self._select_taken_over(self._routing, time.monotonic())
        self._record_colocated_found(self._routing)
        self._publish_routes(self._routing)
        self._configure()

    def refresh(self, layer: int) -> bool:
        """Bring the native tables up to date within a pass, before this layer.

        What only sandboxes served that are ejected or no longer routed to is mapped.

        Returns:
            Whether they changed, so that a layer that could not be computed natively may be now.
        """
        if self._published_routing is None:
            return False
        routing, opening = self._routing, self.connector.opening()
        now_s, state = time.monotonic(), (opening, frozenset(self._health.ejected))
        if routing is not self._mapped_routing or state != self._mapped_state:
            self._mapped_routing, self._mapped_state = routing, state
            self._taken_over.map_lost(routing, now_s, opening=opening, first_layer=layer)
        self._select_taken_over(routing, now_s)
        return self._publish_routes(routing)

    def _select_taken_over(self, routing: RoutingIndex, now_s: float) -> None:
        taken_over = self._taken_over.selection(routing, now_s, self.connector.opening())
        self._taken_over.request_replacements(routing, now_s)
        self._locals.update(self._select_local(taken_over))
        lost = () if self._colocated is None else self._colocated.lost
        self._watch_taken_over({spec for _, spec in taken_over}.union(lost))

    def _record_colocated_found(self, routing: RoutingIndex) -> None:
        """Clear the absences of colocated functions that have sandboxes: no call will find them."""
        absences, colocated = self._absences, self._colocated
        if absences is None or colocated is None or not absences.is_any_missing:
            return
        for _, spec in colocated.selection():
            if (entry := routing.entries.get(spec.id)) is not None and entry.addresses:
                absences.record_found(spec.id)

    def begin(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weight: Tensor) -> bool:
        """Send a layer's calls; return False if it takes the general path.

        Args:
            layer: index of the MoE layer.
            hidden: [T, H] on the host, contiguous, float32 or of a store's dtype; unchanged until
                the layer is finished.
            top_k_index: int64 [T, k], contiguous.
            top_k_weight: float32 [T, k], contiguous.
        """
        n_rows, hidden_size = hidden.shape
        return self._calls.begin(
            layer,
            n_rows,
            hidden_size,
            top_k_index.shape[1],
            hidden.data_ptr(),
            DTYPES[hidden.dtype],
            top_k_index.data_ptr(),
            top_k_weight.data_ptr(),
        )

    def finish(self, layer: int, out: Tensor, while_waiting: OverlappedWork | None) -> bool:
        """Do other work, then write the layer's output; return False for the general path.

        Args:
            layer: index of the MoE layer.
            out: [T, H] on the host, contiguous.
            while_waiting: work to do while the calls are in flight; None for none.
        """
        if while_waiting is not None:
            with limit_torch_threads(self._calls.n_in_flight()):
                while_waiting()
        is_done = self._calls.finish(layer, out.data_ptr(), DTYPES[out.dtype])
        if not is_done:
            self._locals.recheck()
        elif layer + 1 == self._n_layers:
            self.finish_pass()
        return is_done

    def settle_before(self, layer: int) -> None:
        """Hand on what happened natively in the layers before one that takes the general path."""
        before, left = self._before_pass, self._calls.left()
        self._settle()
        if self._colocated is not None:
            self._record_pairs()
            elapsed_s = left.layers_s - before.layers_s
            is_valid = not self._taken_numbers
            self._colocated.finish_layer(layer - 1, elapsed_s, is_valid_sample=is_valid)
        self._before_pass = left

    def finish_pass(self) -> None:
        """Collect what happened natively in a pass; once, after its last layer.

        Where all calls ended well they may wait for those of the next passes.
        """
        before, left = self._before_pass, self._calls.left()
        n_native = left.layers - before.layers
        is_valid = (
            n_native == self._n_layers and not self._taken_numbers and not left.faults
        )  # otherwise it waited for a sandbox that it should not have called
        self._settle_if_due(left)
        if self._colocated is None:
            return
        if self._colocated.ranks_next:
            self._record_pairs()
        if n_native < self._n_layers:
            self._locals.recheck()
        elapsed_s = left.layers_s - before.layers_s
        self._colocated.finish_layer(self._n_layers - 1, elapsed_s, is_valid_sample=is_valid)

    def _settle_if_due(self, left: CallsLeft) -> None:
        is_ordinary = (
            not left.faults
            and not self._taken_numbers
            and (self._absences is None or not self._absences.is_any_missing)
        )
        if not is_ordinary or left.events >= MAX_LEFT_EVENTS:
            self._settle()
            if self._colocated is not None:
                self._record_pairs()

    def totals(self, now_s: float) -> dict[str, LoadTotals]:
        """Return the totals of every function up to `now_s`."""
        _, functions = self._calls.totals(len(self._numbers))
        known = self._routing.entries
        totals = {}
        for name, number in self._numbers.items():
            if name in known and number < len(functions):
                f = functions[number]
                totals[name] = LoadTotals(f.offset_s + f.n_in_flight * now_s, f.calls, f.rows)
        return totals

    def release_unmapped(self) -> None:
        """Release the functions that this process no longer maps."""
        parts = (self._colocated, self._overflow, self._taken_over)
        mapped = {spec for part in parts if part is not None for spec in part.mapped}
        if self._locals.retain(mapped):  # what was selected refers to their weights
            self._local_selections, self._local_selection = NO_SELECTIONS, {}

    def release_memory(self) -> None:
        """Free what mailboxes keep for their next calls; safe from any thread."""
        self._calls.release_memory()

    def close(self) -> None:
        """Close all mailboxes."""
        self.connector.close()

    def _select_local(self, taken_over: Selection) -> Selection:
        """Return what this process computes; the mapping is replaced when that changes."""
        selections = (
            NOTHING if self._colocated is None else self._colocated.selection(),
            NOTHING if self._overflow is None else self._overflow.selection(),
            taken_over,
        )
        before = self._local_selections
        if not all(a is b for a, b in zip(selections, before, strict=True)):
            self._local_selections = selections
            merged = {key: value for part in selections for key, value in part.items()}
            if merged or self._local_selection:
                self._local_selection = merged
        return self._local_selection

    def _watch_taken_over(self, specs: Set[FunctionSpec]) -> None:
        """Count from now on the calls of these functions, which no sandbox has."""
        numbers = frozenset(self._numbers.number(spec.id) for spec in specs)
        if numbers != self._taken_numbers:
            with self._metrics_lock:
                self._taken_numbers = numbers
                self._n_taken_calls = self._sum_taken_calls()

    def _sum_taken_calls(self) -> int:
        _, functions = self._calls.totals(len(self._numbers))
        return sum(functions[number].calls for number in self._taken_numbers)

    def _publish_routes(self, routing: RoutingIndex) -> bool:
        """Publish the routes unless they are; return whether they were not."""
        opening, mailboxes = self.connector.opening(), self.connector.mailboxes()
        handles, ejected = self._locals.handles(), frozenset(self._health.ejected)
        state = (self._suspensions.version, opening, mailboxes, handles, ejected)
        if routing is self._published_routing and state == self._published_state:
            return False
        if routing is not self._published_routing:
            addresses = routing.addresses()
            self._suspensions.retain(addresses)
            self._failure_logger.retain(addresses)
        self._addresses |= {mailbox: address for address, mailbox in mailboxes.items()}
        layers = build_routes(
            routing,
            mailboxes=mailboxes,
            excluded=lambda addresses: self._health.excluded_addresses(addresses) | opening,
            is_suspended=self._suspensions.is_suspended,
            local=handles,
            numbers=self._numbers,
        )
        self._n_routes = [len(layer.routes) for layer in layers]
        self._calls.publish(routing.version, layers)
        self._published_routing, self._published_state = routing, state
        return True

    def _configure(self) -> None:
        """Hand over after how long an answer is late, or without a budget, a sandbox hangs."""
        can_repeat, n_threads = self._health.retry_budget.has_balance, torch.get_num_threads()
        state = (
            *(self._health.thresholds_version, can_repeat),
            *(n_threads, self._max_rows_per_expert),
        )
        if state == self._configured_state:
            return
        self._configured_state = state
        thresholds_s = [
            self._health.latency_thresholds_s(max(1, (1 << size_class) - 1))
            for size_class in range(N_SIZE_CLASSES)
        ]
        hung_s = [
            self._health.hung_after_s(max(1, (1 << size_class) - 1))
            for size_class in range(N_SIZE_CLASSES)
        ]
        if not can_repeat:
            thresholds_s = [(late_s, late_s) for late_s in hung_s]
        settings = CallSettings(
            self._store_dtype,
            self._max_rows,
            self._max_rows_per_expert,
            n_threads,
            self._call_timeout_s,
            tuple(min(h, a, self._call_timeout_s) for h, a in thresholds_s),
            tuple(min(a, self._call_timeout_s) for _, a in thresholds_s),
        )
        self._calls.configure(settings)

    def _settle(self) -> None:
        """Hand on what happened since the last time."""
        events = self._calls.take_events()
        if events:
            self._health.retry_budget.deposit(len(events))
        for event in events:
            self._record_event(event)
        self._settle_metrics()

    def _settle_metrics(self) -> None:
        """Bring the metrics up to date; safe from any thread."""
        with self._metrics_lock:
            for layer_s in self._calls.take_layer_seconds():
                self._metrics.layer_seconds.observe(layer_s)
            before = self._totals
            totals, _ = self._calls.totals(0)
            self._totals = totals
            self._metrics.calls.inc(totals.calls - before.calls)
            self._metrics.mailbox_calls.inc(totals.calls - before.calls)
            n_taken = self._count_taken_over()
            self._metrics.colocated.inc(totals.local_calls - before.local_calls - n_taken)
            self._metrics.sent_bytes.inc(totals.sent_bytes - before.sent_bytes)
            self._metrics.received_bytes.inc(totals.received_bytes - before.received_bytes)

    def _count_taken_over(self) -> int:
        """Count what was computed in place of sandboxes since the last time; return how much."""
        if not self._taken_numbers:
            return 0
        n_calls = self._sum_taken_calls()
        n_new, self._n_taken_calls = n_calls - self._n_taken_calls, n_calls
        self._metrics.local.inc(n_new)
        self._load.local_calls += n_new
        return n_new

    def _record_event(self, event: CallEvent) -> None:
        address = self._addresses.get(event.mailbox)
        if address is None:
            return
        if event.end is CallEnd.OK:
            self._health.record_response(address, n_rows=event.rows, elapsed_s=event.elapsed_s)
            if self._absences is not None and self._absences.is_any_missing:
                self._record_found(address, event.layer)
            return
        self._record_failure(address, event)

    def _record_found(self, address: str, layer: int) -> None:
        assert self._absences is not None
        for entry in self._routing.layers[layer].functions:
            if address in entry.addresses:
                self._absences.record_found(entry.spec.id)

    def _record_failure(self, address: str, event: CallEvent) -> None:
        """Record a call whose functions another replica or the general path computes."""
        now_s = time.monotonic()
        error: CallError | None = None
        if event.end is CallEnd.LATE:
            self._health.retry_budget.try_withdraw()
            _, abandon_s = self._health.latency_thresholds_s(event.rows)
            if event.elapsed_s >= min(abandon_s, self._call_timeout_s):
                error = CallTimeout(f"{address}: no answer in the mailbox in time")
            else:
                self._metrics.hedges.inc()
        elif event.end is CallEnd.STOPPED:
            self._health.record_stopped(address, now_s)
        elif event.end is CallEnd.DEAD:
            was_open = self.connector.drop(address, event.mailbox)
            if was_open and event.status is not SlotStatus.DRAINING:  # it did not say so before
                self._record_exited(address, now_s)
        elif event.end is CallEnd.BROKEN:
            self.connector.drop(address, event.mailbox, retry_s=BROKEN_RETRY_S)
            error = CallError(f"{address}: bad response frame in the mailbox: {event.detail}")
        elif event.status is SlotStatus.NOT_ORDINARY:
            self._max_rows_per_expert = MAX_DIRECT_ROWS_PER_EXPERT
        elif event.status in SUSPENDING_STATUSES:
            self._suspensions.suspend(address, event.layer, now_s)
            if event.status is not SlotStatus.UNKNOWN_FUNCTION:
                error = CallError(f"{address}: {event.status.name}: {event.detail}")
        if error is not None:
            self._metrics.failed_calls.inc()
            self._failure_logger.log_failure(
                address, self._health.record_failure(address, error, now_s), now_s
            )

    def _record_exited(self, address: str, now_s: float) -> None:
        self._metrics.failed_calls.inc()
        self._health.record_exited(address, now_s)
        error = ConnectError(f"{address}: the sandbox exited")
        self._failure_logger.log_failure(address, error, now_s)

    def _record_pairs(self) -> None:
        assert self._colocated is not None
        pairs = iter(self._calls.take_pairs(sum(self._n_routes)))
        for layer, n_routes in enumerate(self._n_routes):
            for function_index in range(n_routes):
                if n_pairs := next(pairs):
                    self._colocated.record_pairs(layer, function_index, n_pairs)


def max_native_rows(store: Store) -> int:
    """Return the rows of the largest batch whose frames go through mailboxes."""
    fitting = (NATIVE_REQUEST_BYTES - HEADER_BYTES) // sum(_row_bytes(store))
    return min(max(MIN_NATIVE_ROWS, fitting), MAX_NATIVE_ROWS)


def mailbox_sizes(store: Store, library: KernelLibrary) -> MailboxSizes:
    """Return the sizes of a mailbox for `max_native_rows` rows of any layer of a store."""
    row_bytes, pairs_bytes = _row_bytes(store)
    layers = store.manifest.layers
    sums_bytes = max(
        layer.hidden_size * SUM_BYTES * min(layer.top_k, MAX_FUNCTIONS_PER_FRAME)
        for layer in layers
    )
    request_bytes, response_bytes = (
        min(MAX_FRAME_BYTES, -(-(HEADER_BYTES + max_native_rows(store) * n) // 64) * 64)
        for n in (row_bytes + pairs_bytes, sums_bytes)
    )
    total_bytes = mailbox_bytes(
        library, n_slots=N_SLOTS, request_bytes=request_bytes, response_bytes=response_bytes
    )
    return MailboxSizes(request_bytes, response_bytes, total_bytes)


def _row_bytes(store: Store) -> tuple[int, int]:
    """Return the largest bytes of a row's hidden state and of its pairs."""
    layers = store.manifest.layers
    item_bytes = getattr(torch, store.manifest.model.dtype).itemsize
    row_bytes = max(layer.hidden_size for layer in layers) * item_bytes
    return row_bytes, max(layer.top_k for layer in layers) * PAIR_BYTES
