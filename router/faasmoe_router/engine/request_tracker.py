"""Tracks the engine's sequences from request to last token, whichever batcher computes them.

Sequences wait in the fair queue by tenant, are computed by the batcher that currently runs, and end
once: finished, cancelled, failed or timed out. Each end is reported to the sequence's generation
and counted in the metrics. When a batcher crashes, the next one resumes its sequences.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from faasmoe_router.engine.batcher import make_request_id
from faasmoe_router.engine.fair_queue import FairQueue
from faasmoe_router.engine.generation import (
    CompletionOutput,
    Generation,
    GenerationRequest,
    UsageRecorder,
)
from faasmoe_router.engine.journal import JournalEntry, JournalError
from faasmoe_router.engine.sequence_spans import record_sequence
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.engine.tracked_request import TrackedRequest
from faasmoe_router.errors import GenerationFailed, NoTokenAllowed
from faasmoe_router.metrics import EngineMetrics
from faasmoe_tracing import NO_SPAN, Span
from faasmoe_transformers.continuous_batching import BatchOutput, ContinuousBatcher

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60.0


class FinishRate:
    """How often sequences end, over the last of them; times are passed in."""

    def __init__(self, *, n_last: int = 64) -> None:
        self._finished_s: deque[float] = deque(maxlen=n_last)

    def record(self, now_s: float) -> None:
        """Record that a sequence ended."""
        self._finished_s.append(now_s)

    def seconds_until(self, n_sequences: int, now_s: float) -> float:
        """Return in how many seconds `n_sequences` more will have ended; 1 if that is unknown."""
        if len(self._finished_s) < 2:
            return 1.0
        interval_s = (now_s - self._finished_s[0]) / len(self._finished_s)
        return min(max(1.0, n_sequences * interval_s), MAX_RETRY_AFTER_S)


class RequestTracker:
    """The sequences that wait or run. Used on the engine's event loop only.

    Args:
        fair_queue: decides which sequence runs next and which is preempted.
        get_batcher: returns the current batcher; None while there is none.
        tokenizer: the model's tokenizer.
        eos_token_ids: the model's EOS tokens.
        metrics: receives latencies, token counts and outcomes.
    """

    def __init__(
        self,
        fair_queue: FairQueue,
        get_batcher: Callable[[], ContinuousBatcher | None],
        *,
        tokenizer: ModelTokenizer,
        eos_token_ids: tuple[int, ...],
        metrics: EngineMetrics,
    ) -> None:
        self._fair_queue = fair_queue
        self._get_batcher = get_batcher
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._tracked: dict[str, TrackedRequest] = {}
        self._finish_rate = FinishRate()
        self._sequence_numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._tracked)

    def n_pages(self, page_tokens: int) -> int:
        """Return the pages of the KV cache that sequences take, as if none shared a prefix."""
        return sum(tracked.n_pages(page_tokens) for tracked in self._tracked.values())

    def seconds_until_place(self, n_sequences: int) -> float:
        """Return in how many seconds `n_sequences` of those present will have ended."""
        return self._finish_rate.seconds_until(n_sequences, time.monotonic())

    def add_requests(
        self,
        requests: Sequence[GenerationRequest],
        tenant: str,
        usage_recorder: UsageRecorder | None,
        journal: Sequence[JournalEntry] = (),
        span: Span = NO_SPAN,
        *,
        is_streamed: bool = True,
    ) -> Generation:
        """Queue a tenant's sequences and start those that may run.

        Args:
            requests: the sequences.
            tenant: the tenant.
            usage_recorder: records their usage and outcome.
            journal: what another process has generated of them, which is put out again first.
            span: traces them.
            is_streamed: whether each token is passed on; else some are put out at a time.

        Raises:
            JournalError: the journal is not one of these sequences.
            TenantQueueFull: the tenant's part of the queue is full.
        """
        self._fair_queue.check_capacity(tenant, len(requests))
        ids = [
            make_request_id(tenant, next(self._sequence_numbers), request.cache_salt)
            for request in requests
        ]
        generation = Generation(len(requests), lambda: self._abort(ids), usage_recorder, span)
        now_s = time.monotonic()
        self._metrics.record_request(len(requests), now_s)
        sequences = {
            sequence_id: TrackedRequest(
                request, generation, index=index, now_s=now_s, is_streamed=is_streamed
            )
            for index, (sequence_id, request) in enumerate(zip(ids, requests, strict=True))
        }
        finished = self._replay(journal, list(sequences.values()), generation)
        for sequence_id, tracked in sequences.items():
            if tracked.index in finished:
                continue
            self._tracked[sequence_id] = tracked
            self._fair_queue.push(
                tenant,
                sequence_id,
                n_prompt_tokens=len(tracked.request.prompt_token_ids),
                priority=tracked.request.priority,
            )
        self.schedule()
        return generation

    def _replay(
        self,
        journal: Sequence[JournalEntry],
        sequences: Sequence[TrackedRequest],
        generation: Generation,
    ) -> set[int]:
        """Put out what a journal says; return the indices of the sequences that it finishes."""
        finished: set[int] = set()
        for entry in journal:
            if entry.index in finished or not 0 <= entry.index < len(sequences):
                raise JournalError(f"the journal has more than sequence {entry.index} generates")
            tracked = sequences[entry.index]
            output = tracked.replay(entry.progress, self._tokenizer, self._eos_token_ids)
            if output.finish_reason is not None:
                finished.add(entry.index)
            if output.finish_reason is None and len(tracked.tokens) >= tracked.request.n_sampled:
                raise JournalError(f"the journal has too many tokens of sequence {entry.index}")
            counts: dict[str, Any] = {
                "n_cached_tokens": entry.n_cached_tokens,
                "n_cache_written_tokens": entry.n_cache_written_tokens,
            }
            generation.put_output(entry.index, replace(output, **counts))
        if journal:
            generation.mark_started()
            self._metrics.resumed_requests.inc(len(sequences) - len(finished))
        return finished

    def schedule(self) -> None:
        """Run sequences while there are slots, and preempt those of tenants beyond their share."""
        batcher = self._get_batcher()
        if batcher is None or not batcher.is_alive:
            return
        while True:
            while (sequence_id := self._fair_queue.pop()) is not None:
                self._submit_or_resume(sequence_id, batcher)
            preempted_id = self._fair_queue.preempt()
            if preempted_id is None:
                return
            self._metrics.preemptions.inc()
            self._tracked[preempted_id].n_preemptions += 1
            batcher.preempt_request(preempted_id)

    def _submit_or_resume(self, sequence_id: str, batcher: ContinuousBatcher) -> None:
        tracked = self._tracked[sequence_id]
        if tracked.is_in_epoch(batcher.epoch):
            batcher.resume_request(sequence_id)
            return
        tracked.generation.mark_started()
        if tracked.started_s is None:
            tracked.started_s = time.monotonic()
        tracked.submit(sequence_id, batcher, self._tokenizer, self._eos_token_ids)

    def _abort(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            if self._remove(sequence_id) is not None:
                self._metrics.record_finished("abort")
        self.schedule()

    def _remove(self, sequence_id: str) -> TrackedRequest | None:
        """Remove a sequence from tracker, queue and batcher; return it, None if it is unknown."""
        tracked = self._tracked.pop(sequence_id, None)
        if tracked is not None:
            self._finish_rate.record(time.monotonic())
            self._put_collected(sequence_id, tracked)
        self._fair_queue.remove(sequence_id)
        batcher = self._get_batcher()
        if tracked is not None and batcher is not None and tracked.is_in_epoch(batcher.epoch):
            batcher.cancel_request(sequence_id)
        return tracked

    def _put_collected(self, sequence_id: str, tracked: TrackedRequest) -> None:
        """Put out what was computed of a sequence that ends early, and not processed."""
        try:
            delta = tracked.process_collected()
        except Exception:  # it ends all the same, and so do the others
            logger.exception("Processing the output of a request failed")
            return
        if delta is not None:
            self._charge(sequence_id, delta)
            tracked.generation.put_output(tracked.index, delta)

    def process_outputs(
        self, outputs: Sequence[BatchOutput], cached_tokens: Mapping[str, int]
    ) -> None:
        """Process a batch's outputs.

        Args:
            outputs: the outputs; those of cancelled sequences are ignored.
            cached_tokens: by sequence, tokens of its prompt found in the prefix cache; given once.
        """
        now_s = time.monotonic()
        for output in outputs:
            tracked = self._tracked.get(output.request_id)
            if tracked is None:
                continue  # cancelled while the batch ran
            if output.error is not None:
                logger.error("A request failed in the engine: %s", output.error)
                self._fail_request(output.request_id)
                continue
            try:
                n_cached = cached_tokens.get(output.request_id, 0)
                self._process_output(output, tracked, n_cached=n_cached, now_s=now_s)
            except Exception:  # one request must not stop the others
                logger.exception("Processing the output of a request failed")
                self._fail_request(output.request_id)
        self.schedule()

    def fail_requests(self, sequence_ids: Sequence[str], error: GenerationFailed) -> None:
        """Fail requests that cannot continue, ahead of the tokens sampled from their scores."""
        for sequence_id in sequence_ids:
            if sequence_id in self._tracked:
                if not isinstance(error, NoTokenAllowed):  # which the client caused
                    logger.error("A request failed: %s", error)
                self._fail_request(sequence_id, error)

    def _process_output(
        self, output: BatchOutput, tracked: TrackedRequest, *, n_cached: int, now_s: float
    ) -> None:
        is_first = not tracked.tokens
        if tracked.collect(output):
            self._record_latency(tracked, n_cached=n_cached, now_s=now_s, is_first=False)
            return
        delta = tracked.process_output(output)
        if delta is None:
            return
        self._record_latency(tracked, n_cached=n_cached, now_s=now_s, is_first=is_first)
        if is_first:
            n_written = self._n_cache_written(output.request_id, tracked, n_cached)
            delta = replace(delta, n_cached_tokens=n_cached, n_cache_written_tokens=n_written)
        self._charge(output.request_id, delta)
        if delta.finish_reason is not None:
            self._finish(output, tracked, delta, now_s=now_s)
        tracked.generation.put_output(tracked.index, delta)

    def _charge(self, sequence_id: str, delta: CompletionOutput) -> None:
        self._metrics.generation_tokens.inc(delta.n_tokens)
        self._fair_queue.charge(sequence_id, delta.n_tokens)

    def _n_cache_written(self, sequence_id: str, tracked: TrackedRequest, n_cached: int) -> int:
        """Return how many tokens of a prompt the prefix cache has gained by it."""
        batcher = self._get_batcher()
        if batcher is None:
            return 0
        n_shareable = batcher.n_shareable_tokens(sequence_id, tracked.request.prompt_token_ids)
        return max(0, n_shareable - n_cached)

    def _finish(
        self, output: BatchOutput, tracked: TrackedRequest, delta: CompletionOutput, *, now_s: float
    ) -> None:
        if output.is_finished():
            del self._tracked[output.request_id]
            self._fair_queue.remove(output.request_id)
        else:  # ended by a stop string, of which the batcher knows nothing
            self._remove(output.request_id)
        assert delta.finish_reason is not None
        times, counts = tracked.times(now_s), tracked.counts
        span = tracked.generation.span
        self._metrics.record_sequence(
            times, counts, max_tokens=tracked.request.max_tokens, trace_id=span.trace_id
        )
        self._metrics.record_finished(delta.finish_reason)
        record_sequence(span, times, counts, index=tracked.index, finish_reason=delta.finish_reason)

    def _record_latency(
        self, tracked: TrackedRequest, *, n_cached: int, now_s: float, is_first: bool
    ) -> None:
        if is_first:
            n_prompt = len(tracked.request.prompt_token_ids)
            self._metrics.record_prompt(n_prompt, n_cached)
            tracked.first_token_s, tracked.n_cached = now_s, n_cached
            trace_id = tracked.generation.span.trace_id
            self._metrics.record_first_token(now_s - tracked.arrival_s, trace_id=trace_id)
        else:
            self._metrics.inter_token_latency_s.observe(now_s - tracked.last_token_s)
        tracked.last_token_s = now_s

    def _fail_request(self, sequence_id: str, error: GenerationFailed | None = None) -> None:
        tracked = self._remove(sequence_id)
        if tracked is not None:
            error = error or GenerationFailed("the model could not finish this request")
            tracked.generation.fail(error)
            self._metrics.record_finished("error")

    def fail_all(self, reason: str) -> None:
        """Fail every request."""
        self._fail_many(list(self._tracked), reason)

    def record_crash(self, epoch: object) -> None:
        """Count a crash for the sequences it interrupted; fail those that may be its cause."""
        for sequence_id, tracked in self._tracked.items():
            if tracked.is_in_epoch(epoch) and self._fair_queue.is_running(sequence_id):
                tracked.record_crash()
        suspects = [i for i, running in self._tracked.items() if running.is_crash_suspect]
        self._fail_many(suspects, "the engine crashed again while it computed this request")

    def resubmit_running(self, batcher: ContinuousBatcher) -> None:
        """Submit the sequences that have a slot to a new batcher; others wait for one."""
        running_ids = [i for i in self._tracked if self._fair_queue.is_running(i)]
        for sequence_id in running_ids:
            self._submit_or_resume(sequence_id, batcher)
        self._metrics.resumed_requests.inc(sum(bool(self._tracked[i].tokens) for i in running_ids))

    def _fail_many(self, sequence_ids: Sequence[str], reason: str) -> None:
        if sequence_ids:
            logger.error("%d requests failed: %s", len(sequence_ids), reason)
        for sequence_id in sequence_ids:
            self._fail_request(sequence_id, GenerationFailed(reason))

    def fail_timed_out(self, now_s: float, *, timeout_s: float) -> None:
        """Fail the requests that arrived more than `timeout_s` before `now_s`."""
        timed_out = [i for i, r in self._tracked.items() if now_s - r.arrival_s > timeout_s]
        for sequence_id in timed_out:
            reason = f"the request was not finished within {timeout_s:g} s"
            self._fail_request(sequence_id, GenerationFailed(reason))
