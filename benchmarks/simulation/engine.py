"""A router's engine: continuous batching under the real fair queue, in simulated time.

Every step decodes one token of each running sequence and takes prompt tokens up to the budget of
a step, as the real scheduler does. Steps of the same composition are one event, which an arrival
cuts at the next step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.simulation.events import Event, EventLoop
from benchmarks.simulation.step_time import StepTime
from benchmarks.simulation.traffic import TrafficRequest

from faasmoe_router.engine.fair_queue import FairQueue, Share


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of one engine, with the MoEModel's names."""

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024


@dataclass(slots=True, eq=False)
class ServedRequest:
    """One request and what became of it; times are simulated seconds, -1 until known.

    Attributes:
        request: the request.
        admitted_s: when its functions and router were there.
        started_s: when it first got a slot of a batch.
        first_token_s: when its first token was there.
        finished_s: when its last token was there.
        cold_start_s: how long it waited for functions and a router.
        n_done: generated tokens.
        n_moved: how often it went on in another router.
        refusal: why it was refused; empty if it was not.
    """

    request: TrafficRequest
    admitted_s: float = -1.0
    started_s: float = -1.0
    first_token_s: float = -1.0
    finished_s: float = -1.0
    cold_start_s: float = 0.0
    n_done: int = 0
    n_moved: int = 0
    refusal: str = ""


@dataclass(slots=True, eq=False)
class _Running:
    """A sequence with a slot.

    Attributes:
        served: the request.
        n_prefill: tokens whose KV cache is still to be computed.
        since_step: the step after which it began to decode.
        charged: generated tokens that the fair queue was told of.
    """

    served: ServedRequest
    n_prefill: int
    since_step: int = 0
    charged: int = 0


@dataclass(slots=True)
class _Phase:
    """Steps of one composition that follow each other."""

    started_s: float
    step_s: float
    n_steps: int
    rows: int
    prompt: Mapping[str, int]
    event: Event


@dataclass(slots=True)
class EngineTotals:
    """Totals of an engine: steps, seconds that it computed, seconds that calls were in flight."""

    steps: int = 0
    busy_s: float = 0.0
    calls_s: float = 0.0


@dataclass(slots=True)
class EngineHooks:
    """What an engine tells and asks of the system around it.

    Attributes:
        on_finished: called with each finished request.
        on_busy: called when the engine begins and stops to compute.
        experts_slowdown: factor on the functions' time, of nodes that are shared.
    """

    on_finished: Callable[[ServedRequest], None]
    on_busy: Callable[[bool], None] = lambda busy: None
    experts_slowdown: Callable[[int], float] = lambda rows: 1.0


class Engine:
    """One engine.

    Args:
        loop: the clock.
        limits: its limits.
        step_time: how long steps take.
        shares: the tenants' shares in the fair queue.
        hooks: the system around it.
    """

    def __init__(
        self,
        loop: EventLoop,
        limits: EngineLimits,
        step_time: StepTime,
        *,
        shares: Mapping[str, Share],
        hooks: EngineHooks,
    ) -> None:
        self.totals = EngineTotals()
        self._loop = loop
        self._limits = limits
        self._step_time = step_time
        self._hooks = hooks
        self._queue = FairQueue(slots=limits.max_num_seqs, max_queued=limits.max_waiting)
        self._queue.set_shares(shares)
        self._held: dict[str, ServedRequest] = {}
        self._running: dict[str, _Running] = {}
        self._prefilling: dict[str, _Running] = {}
        self._ends: list[tuple[int, int, str]] = []  # (last step, number, id) of decoding ones
        self._phase: _Phase | None = None
        self._is_paused = False

    @property
    def n_held(self) -> int:
        """Requests that run or wait."""
        return len(self._held)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._queue.n_waiting

    def submit(self, served: ServedRequest) -> None:
        """Queue a request; raises TenantQueueFull if its tenant's part of the queue is full."""
        request, name = served.request, str(served.request.number)
        if not served.n_moved:
            self._queue.check_capacity(request.tenant, 1)
        n_prompt = request.n_prompt + served.n_done
        self._queue.push(request.tenant, name, n_prompt_tokens=n_prompt)
        self._held[name] = served
        if self._phase is None:
            self._start_phase()
        elif self._queue.sequence_counts(request.tenant)[1] == 1:  # it may be the next to start
            self._cut_phase()

    def pause(self) -> None:
        """Stop: a function that the engine calls is gone. The step that is cut is repeated."""
        if self._is_paused:
            return
        self._is_paused = True
        phase = self._phase
        if phase is not None:
            phase.event.cancel()
            elapsed_s = self._loop.now - phase.started_s
            self._finish_steps(phase, min(phase.n_steps - 1, int(elapsed_s / phase.step_s)))
            self._set_phase(None)

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._is_paused:
            self._is_paused = False
            if self._phase is None:
                self._start_phase()

    def take_all(self) -> list[ServedRequest]:
        """Stop for good and return the requests that it held, in order of arrival."""
        self.pause()
        for name, running in self._running.items():
            if name not in self._prefilling:
                running.served.n_done += self.totals.steps - running.since_step
        held = sorted(self._held.values(), key=lambda served: served.request.number)
        for name in list(self._held):
            self._queue.remove(name)
        self._held, self._running, self._prefilling, self._ends = {}, {}, {}, []
        return held

    def read_totals(self) -> EngineTotals:
        """Return the totals until now, the steps in progress included."""
        totals, phase = self.totals, self._phase
        if phase is None:
            return totals
        elapsed_s = self._loop.now - phase.started_s
        share = elapsed_s / phase.step_s
        return EngineTotals(
            totals.steps + int(share),
            totals.busy_s + elapsed_s,
            totals.calls_s + share * self._step_time.calls_s(phase.rows),
        )

    def _start_phase(self) -> None:
        if self._is_paused:
            return
        self._fill_slots()
        n_decoding = len(self._running) - len(self._prefilling)
        prompt, n_steps = self._next_prompt(self._limits.max_num_batched_tokens - n_decoding)
        if self._ends:
            until_end = self._ends[0][0] - self.totals.steps
            n_steps = until_end if n_steps == 0 else min(n_steps, until_end)
        if n_steps == 0:
            self._set_phase(None)
            return
        rows = n_decoding + sum(prompt.values())
        slowdown = self._hooks.experts_slowdown(rows)
        step_s = self._step_time.step_s(rows, experts_slowdown=slowdown)
        now = self._loop.now
        event = self._loop.at(now + n_steps * step_s, self._end_phase)
        self._set_phase(_Phase(now, step_s, n_steps, rows, prompt, event))

    def _fill_slots(self) -> None:
        if self._queue.n_waiting:
            self._settle_charges()
        while True:
            name = self._queue.pop()
            if name is None:
                victim = self._queue.preempt() if self._queue.n_waiting else None
                if victim is None:
                    return
                self._evict(victim)
                continue
            served = self._held[name]
            if served.started_s < 0:
                served.started_s = self._loop.now
            running = _Running(
                served, served.request.n_prompt + served.n_done, charged=served.n_done
            )
            self._running[name] = self._prefilling[name] = running

    def _evict(self, name: str) -> None:
        """Take a sequence's slot: its KV cache is computed again later, its tokens included."""
        running = self._running.pop(name)
        if self._prefilling.pop(name, None) is None:
            running.served.n_done += self.totals.steps - running.since_step
            self._ends = [end for end in self._ends if end[2] != name]
            heapq.heapify(self._ends)

    def _next_prompt(self, budget: int) -> tuple[dict[str, int], int]:
        """Return the prompt tokens of the next steps by sequence, and the number of steps."""
        prompt: dict[str, int] = {}
        for name, running in self._prefilling.items():
            if budget <= 0:
                break
            prompt[name] = min(budget, running.n_prefill)
            budget -= prompt[name]
        if not prompt:
            return prompt, 0
        first = next(iter(prompt))
        is_alone = len(prompt) == 1 and prompt[first] < self._prefilling[first].n_prefill
        return prompt, self._prefilling[first].n_prefill // prompt[first] if is_alone else 1

    def _end_phase(self) -> None:
        phase = self._phase
        assert phase is not None
        self._finish_steps(phase, phase.n_steps)
        self._start_phase()

    def _cut_phase(self) -> None:
        """End the phase with the step in progress, so that an arrival joins the next one."""
        phase = self._phase
        assert phase is not None
        n_steps = int((self._loop.now - phase.started_s) / phase.step_s) + 1
        if n_steps < phase.n_steps:
            phase.event.cancel()
            phase.n_steps = n_steps
            phase.event = self._loop.at(phase.started_s + n_steps * phase.step_s, self._end_phase)

    def _finish_steps(self, phase: _Phase, n_steps: int) -> None:
        if n_steps <= 0:
            return
        totals = self.totals
        totals.steps += n_steps
        totals.busy_s += n_steps * phase.step_s
        totals.calls_s += n_steps * self._step_time.calls_s(phase.rows)
        for name, n_tokens in phase.prompt.items():
            running = self._prefilling[name]
            running.n_prefill -= n_tokens * n_steps
            if running.n_prefill <= 0:
                self._finish_prefill(name, running)
        while self._ends and self._ends[0][0] <= totals.steps:
            name = heapq.heappop(self._ends)[2]
            self._finish(name, self._running[name])

    def _finish_prefill(self, name: str, running: _Running) -> None:
        """Record the token that the prompt's last step brings, and decode the rest."""
        del self._prefilling[name]
        served = running.served
        if served.first_token_s < 0:
            served.first_token_s = self._loop.now
        served.n_done += 1
        running.since_step = self.totals.steps
        n_left = served.request.n_output - served.n_done
        if n_left <= 0:
            self._finish(name, running)
        else:
            heapq.heappush(self._ends, (self.totals.steps + n_left, served.request.number, name))

    def _finish(self, name: str, running: _Running) -> None:
        served = running.served
        served.n_done = served.request.n_output
        served.finished_s = self._loop.now
        self._queue.charge(name, served.n_done - running.charged)
        self._queue.remove(name)
        del self._running[name], self._held[name]
        self._hooks.on_finished(served)

    def _settle_charges(self) -> None:
        """Tell the fair queue of all generated tokens: a decision follows that depends on them."""
        for name, running in self._running.items():
            if name not in self._prefilling:
                n_done = running.served.n_done + self.totals.steps - running.since_step
                self._queue.charge(name, n_done - running.charged)
                running.charged = n_done

    def _set_phase(self, phase: _Phase | None) -> None:
        was_busy, self._phase = self._phase is not None, phase
        if was_busy != (phase is not None):
            self._hooks.on_busy(phase is not None)
