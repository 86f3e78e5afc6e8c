"""Choices of text completions: text, after the echoed prompt if it is requested."""

from collections.abc import Sequence
from typing import Any

from faasmoe_router.api.choice_logprobs import OffsetLogprobs, to_completion_logprobs
from faasmoe_router.api.choices import ChoiceState, with_finish_reason
from faasmoe_router.api.token_details import (
    TokenBytes,
    legacy_token_name,
    text_offsets,
    token_id_name,
)
from faasmoe_router.engine.generation import CompletionOutput
from faasmoe_router.engine.sampler import SampledLogprob


class CompletionChoiceFormatter:
    """Formats text completions.

    Args:
        token_bytes: returns the bytes of a token, for log-probabilities; None reports none.
        echoed_prompts: the prompt of each choice, to precede its text; None echoes none.
        prompts: token IDs of each choice's prompt, for log-probabilities of echoed prompts.
        n_top: candidates per token in log-probabilities.
        as_ids: whether log-probabilities name tokens by their IDs.
    """

    id_prefix = "cmpl"
    object_type = "text_completion"
    chunk_object_type = "text_completion"

    def __init__(
        self,
        token_bytes: TokenBytes | None = None,
        echoed_prompts: Sequence[str] | None = None,
        *,
        prompts: Sequence[Sequence[int]] = (),
        n_top: int | None = None,
        as_ids: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._echoed_prompts = echoed_prompts
        self._prompts = prompts
        self._scored_prompts: dict[int, list[SampledLogprob]] = {}  # of streams, until echoed
        self._echoed: set[int] = set()
        self._n_top = n_top
        self._token_name = (
            token_id_name if as_ids or token_bytes is None else legacy_token_name(token_bytes)
        )

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return a choice with its text, after the echoed prompt."""
        text = self._echoed_prompt(index) + choice.text
        text_choice = self._text_choice(index, text, token_logprobs=choice.logprobs, is_end=True)
        if self._echoed_prompts is not None and text_choice["logprobs"] is not None:
            of_prompt = self._prompt_logprobs(index, choice.prompt_logprobs)
            logprobs = text_choice["logprobs"]
            text_choice["logprobs"] = {n: of_prompt[n] + logprobs[n] for n in logprobs}
        return with_finish_reason(text_choice, choice.finish_reason, choice.stop_reason)

    def _prompt_logprobs(
        self, index: int, prompt_logprobs: Sequence[SampledLogprob]
    ) -> dict[str, Any]:
        """Return log-probabilities of a choice's echoed prompt; its first token has none."""
        assert self._token_bytes is not None
        prompt = self._prompts[index]
        offsets = text_offsets(prompt, self._token_bytes)
        scored = list(zip(offsets[1:], prompt_logprobs, strict=True))
        of_prompt = to_completion_logprobs(
            scored, self._token_name, first_text_offset=0, n_top=self._n_top
        )
        first: dict[str, Any] = {
            "tokens": self._token_name(prompt[0]),
            "token_logprobs": None,
            "top_logprobs": None,
            "text_offset": 0,
        }
        return {name: [first[name], *values] for name, values in of_prompt.items()}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the echoed prompt, if any; text completions have no role.

        One with log-probabilities follows when they are known.
        """
        if not self._echoed_prompts or self._prompts:
            return None
        return self._text_choice(index, self._echoed_prompt(index))

    def _scored_prompt(self, index: int, output: CompletionOutput) -> list[dict[str, Any]]:
        """Return the echoed prompt with its log-probabilities, once, when all are known."""
        if not self._echoed_prompts or not self._prompts or index in self._echoed:
            return []
        scored = self._scored_prompts.setdefault(index, [])
        scored += output.prompt_logprobs
        if len(scored) < len(self._prompts[index]) - 1:
            return []
        self._echoed.add(index)
        chunk = self._text_choice(index, self._echoed_prompt(index))
        return [
            {**chunk, "logprobs": self._prompt_logprobs(index, self._scored_prompts.pop(index))}
        ]

    def format_chunks(self, index: int, output: CompletionOutput) -> list[dict[str, Any]]:
        """Return a choice's text; the last entry has the finish reason."""
        chunks = self._scored_prompt(index, output)
        if output.text or output.logprobs:
            chunks.append(self._text_choice(index, output.text, token_logprobs=output.logprobs))
        if output.finish_reason is not None:
            last = chunks.pop() if chunks else self._text_choice(index, "", is_end=True)
            chunks.append(with_finish_reason(last, output.finish_reason, output.stop_reason))
        return chunks

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """Return an empty text."""
        return self._text_choice(index, "")

    def count_reasoning_tokens(self, index: int, output: CompletionOutput) -> int:
        """Return 0: a text has no parts."""
        return 0

    def _echoed_prompt(self, index: int) -> str:
        return self._echoed_prompts[index] if self._echoed_prompts else ""

    def _text_choice(
        self,
        index: int,
        text: str,
        *,
        token_logprobs: OffsetLogprobs = (),
        is_end: bool = False,
    ) -> dict[str, Any]:
        logprobs = None
        is_whole = bool(token_logprobs) or not is_end or bool(self._prompts)
        if self._token_bytes is not None and is_whole:
            offset = len(self._echoed_prompt(index))
            logprobs = to_completion_logprobs(
                token_logprobs, self._token_name, first_text_offset=offset, n_top=self._n_top
            )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
