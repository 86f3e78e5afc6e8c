"""One sequence of the engine from request to last token, with its output so far.

Knows its batcher's outputs and what becomes of them, and neither queue nor metrics.
"""

from __future__ import annotations

from collections.abc import Collection

from faasmoe_router.engine.batch_sampler import LogitsState
from faasmoe_router.engine.generation import CompletionOutput, Generation, GenerationRequest
from faasmoe_router.engine.journal import Progress
from faasmoe_router.engine.output_processor import SequenceOutputProcessor
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.sequence_times import SequenceCounts, SequenceTimes
from faasmoe_transformers.continuous_batching import BatchOutput, ContinuousBatcher

MAX_COLLECTED_TOKENS = 16
"""Tokens of a sequence whose text is read as a whole that are processed at once: each time costs
the event loop, which shares the interpreter with the engine's thread."""
MAX_CRASHES = 1
"""Crashes of a batcher that a sequence may be part of; after one more it fails as their cause."""


class TrackedRequest:
    """A sequence that waits or runs, with its output so far.

    It survives a crash of its batcher: the next one is given the prompt and the tokens so far as
    one prompt, and continues from there.

    Args:
        request: the request.
        generation: the stream that receives its output.
        index: its index in the generation.
        now_s: monotonic time of its arrival.
        is_streamed: whether its reader passes each token on.

    Attributes:
        request: the request.
        generation: the stream that receives its output.
        index: its index in the generation.
        tokens: tokens generated so far, by any batcher.
        arrival_s: monotonic time of its arrival.
        started_s: monotonic time at which a batcher got it first; None before.
        first_token_s: monotonic time of its first token; None before.
        n_cached: tokens of its prompt found in the prefix cache.
        n_preemptions: times that it was preempted.
        last_token_s: monotonic time of its last token, or of its arrival.
    """

    __slots__ = (
        *("_epoch", "_n_crashes", "_n_resumed_tokens", "_output_processor"),
        *("_can_collect", "_collected"),
        *("arrival_s", "first_token_s", "generation", "index", "last_token_s", "n_cached"),
        *("n_preemptions", "request", "started_s", "tokens"),
    )

    def __init__(
        self,
        request: GenerationRequest,
        generation: Generation,
        *,
        index: int,
        now_s: float,
        is_streamed: bool = True,
    ) -> None:
        self._can_collect = not is_streamed and request.ends_by_token
        self._collected: BatchOutput | None = None  # received and not processed
        self.request = request
        self.generation = generation
        self.index = index
        self.tokens: list[int] = []
        self.arrival_s = now_s
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.n_cached = 0
        self.n_preemptions = 0
        self.last_token_s = now_s
        self._output_processor: SequenceOutputProcessor | None = None  # until it first runs
        self._epoch: object = None  # of the batcher that has it
        self._n_resumed_tokens = 0  # tokens that were part of the prompt there
        self._n_crashes = 0

    def is_in_epoch(self, epoch: object) -> bool:
        """Return whether the batcher of this epoch has it."""
        return self._epoch is epoch

    def n_pages(self, page_tokens: int) -> int:
        """Return the pages of the KV cache that its tokens take; 0 before it first runs."""
        if self._epoch is None:
            return 0
        return -(-(self.request.n_given + len(self.tokens)) // page_tokens)

    @property
    def is_crash_suspect(self) -> bool:
        """Whether it was part of more crashes than can be coincidence."""
        return self._n_crashes > MAX_CRASHES

    def record_crash(self) -> None:
        """Count a crash of the batcher that was computing it."""
        self._n_crashes += 1

    def submit(
        self,
        sequence_id: str,
        batcher: ContinuousBatcher,
        tokenizer: ModelTokenizer,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """Submit it to a batcher, to continue from the tokens so far.

        A batcher that has just crashed accepts none; its successor gets the sequence instead.

        Args:
            sequence_id: its id.
            batcher: the batcher.
            tokenizer: the model's tokenizer.
            eos_token_ids: the model's EOS tokens.
        """
        self._collected = None  # of another batcher, which this one computes again
        request = self.request
        stop_token_ids = request.stop_conditions.all_stop_token_ids(eos_token_ids)
        logits_state = LogitsState.for_request(request, stop_token_ids)
        is_accepted = batcher.add_request(
            sequence_id,
            (*request.prompt_token_ids[: request.n_given], *self.tokens),
            max_tokens=request.n_sampled - len(self.tokens),
            # A prompt may contain stop tokens, of which the batcher must not know then.
            stop_token_ids=() if request.scores_prompt else stop_token_ids,
            logits_state=logits_state,
        )
        if not is_accepted:
            return
        self._epoch, self._n_resumed_tokens = batcher.epoch, len(self.tokens)
        self._attach_output_processor(logits_state, tokenizer, stop_token_ids)

    def _attach_output_processor(
        self,
        logits_state: LogitsState | None,
        tokenizer: ModelTokenizer,
        stop_token_ids: Collection[int],
    ) -> None:
        if self._output_processor is not None:
            self._output_processor.set_logits_state(logits_state)
            return
        detokenizer = tokenizer.new_detokenizer(
            include_special_tokens=self.request.include_special_tokens
        )
        self._output_processor = SequenceOutputProcessor(
            self.request,
            detokenizer=detokenizer,
            stop_token_ids=stop_token_ids,
            logits_state=logits_state,
        )

    def replay(
        self, progress: Progress, tokenizer: ModelTokenizer, eos_token_ids: tuple[int, ...]
    ) -> CompletionOutput:
        """Take over tokens that another process has sampled, before it is submitted."""
        if self._output_processor is None:
            stop_conditions = self.request.stop_conditions
            stop_token_ids = stop_conditions.all_stop_token_ids(eos_token_ids)
            self._attach_output_processor(None, tokenizer, stop_token_ids)
        assert self._output_processor is not None
        self.tokens += progress.token_ids
        return self._output_processor.replay(progress)

    def process_output(self, output: BatchOutput) -> CompletionOutput | None:
        """Process the output of a batch; return what is new, None if nothing is."""
        self._collected = None
        new_tokens = self._new_tokens(output)
        if not new_tokens or self._output_processor is None:
            return None
        self.tokens += new_tokens
        return self._output_processor.process_tokens(new_tokens)

    def collect(self, output: BatchOutput) -> bool:
        """Keep an output to be processed with later ones; return whether it may wait."""
        may_wait = self._can_collect and bool(self.tokens) and not output.is_finished()
        if not may_wait or len(self._new_tokens(output)) >= MAX_COLLECTED_TOKENS:
            return False
        self._collected = output
        return True

    def process_collected(self) -> CompletionOutput | None:
        """Process what was collected; return what is new, None if nothing is."""
        return None if self._collected is None else self.process_output(self._collected)

    def _new_tokens(self, output: BatchOutput) -> list[int]:
        return output.generated_tokens[len(self.tokens) - self._n_resumed_tokens :]

    def times(self, now_s: float) -> SequenceTimes:
        """Return when things happened to it, the last token now."""
        started_s = self.arrival_s if self.started_s is None else self.started_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return SequenceTimes(self.arrival_s, started_s, first_token_s, now_s)

    @property
    def counts(self) -> SequenceCounts:
        """Its tokens and preemptions."""
        n_prompt = len(self.request.prompt_token_ids)
        return SequenceCounts(n_prompt, self.n_cached, len(self.tokens), self.n_preemptions)
