"""A sequence on its way through the engine: what is known of it, whichever batcher computes it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from faasmoe_router.engine.batching import Batcher
from faasmoe_router.engine.generation import Delta, Generation, GenerationRequest
from faasmoe_router.engine.sequence import Sequence as TokenSequence
from faasmoe_router.engine.steps import Steps
from faasmoe_router.engine.text import TextCodec

MAX_DEATHS = 1


class Running:
    """A sequence that waits or runs, where its deltas go, and when things happened to it.

    A batcher that dies takes nothing along: the next one is given the prompt and the tokens that
    are known, as one prompt, and goes on from there.

    Attributes:
        request: what was asked for.
        generation: where deltas go.
        index: which of the generation's sequences it is.
        tokens: those that were generated and told, whoever generated them.
        arrived_s: when it came.
        last_s: when it last had a token.
    """

    __slots__ = (
        *("_life", "_n_before", "_n_deaths", "_text"),
        *("arrived_s", "generation", "index", "last_s", "request", "tokens"),
    )

    def __init__(
        self, request: GenerationRequest, generation: Generation, *, index: int, now_s: float
    ) -> None:
        self.request = request
        self.generation = generation
        self.index = index
        self.tokens: list[int] = []
        self.arrived_s = now_s
        self.last_s = now_s
        self._text: TokenSequence | None = None  # until its first turn
        self._life: object = None  # of the batcher that has it
        self._n_before = 0  # tokens that were known when that got it
        self._n_deaths = 0

    def is_in(self, life: object) -> bool:
        """Return whether the batcher of this life has it."""
        return self._life is life

    @property
    def is_suspect(self) -> bool:
        """Whether more batchers have died with it than may be chance."""
        return self._n_deaths > MAX_DEATHS

    def count_death(self) -> None:
        """Take note that a batcher died that was computing it."""
        self._n_deaths += 1

    def submit(
        self, sequence_id: str, batcher: Batcher, codec: TextCodec, eos_ids: tuple[int, ...]
    ) -> None:
        """Give it to a batcher, to go on from the tokens that are known.

        Raises:
            EngineUnavailable: the batcher takes none.
        """
        request = self.request
        end_ids = request.ending.end_ids(eos_ids)
        steps = Steps.of(request, end_ids)
        batcher.add(
            sequence_id,
            (*request.prompt_ids, *self.tokens),
            max_tokens=request.max_tokens - len(self.tokens),
            end_ids=end_ids,
            steps=steps,
        )
        self._life, self._n_before = batcher.life, len(self.tokens)
        self._tell_by(steps, codec, end_ids)

    def _tell_by(self, steps: Steps | None, codec: TextCodec, end_ids: Collection[int]) -> None:
        if self._text is not None:
            self._text.go_on_by(steps)
            return
        detokenizer = codec.detokenizer(special=self.request.special)
        self._text = TokenSequence(
            self.request, detokenizer=detokenizer, end_ids=end_ids, steps=steps
        )

    def take(self, output: Any) -> Delta | None:
        """Take what a batch generated; return what is new in it, if anything is."""
        new: list[int] = output.generated_tokens[len(self.tokens) - self._n_before :]
        if not new or self._text is None:
            return None
        self.tokens += new
        return self._text.take(new)
