"""Token IDs and log-probabilities of prompts in responses, in vLLM's and OpenAI's legacy forms."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_router.engine.sampler import SampledLogprob

TokenBytes = Callable[[int], bytes]
TokenName = Callable[[int], str]


def legacy_token_name(token_bytes: TokenBytes) -> TokenName:
    """Return the function that names tokens in the legacy form: their text, or their bytes."""

    def name(token: int) -> str:
        text = token_bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)

    return name


def token_id_name(token: int) -> str:
    """Return a token's name with `return_tokens_as_token_ids`."""
    return f"token_id:{token}"


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """What a request asks to know of tokens.

    Attributes:
        prompts: token IDs of each choice's prompt.
        returns_ids: whether token IDs of prompts and choices are returned.
        n_prompt_logprobs: candidates per prompt token in `prompt_logprobs`; None returns none.
        token_bytes: returns the bytes of a token; None without log-probabilities.
        is_chat: whether the prompt is told beside the choices, as there is only one.
    """

    prompts: Sequence[Sequence[int]] = ()
    returns_ids: bool = False
    n_prompt_logprobs: int | None = None
    token_bytes: TokenBytes | None = None
    is_chat: bool = False

    def response_fields(self, prompt_logprobs: Sequence[SampledLogprob]) -> dict[str, Any]:
        """Return the fields of a chat beside its choices."""
        return self._prompt_fields(0, prompt_logprobs) if self.is_chat else {}

    def choice_fields(
        self, index: int, token_ids: Sequence[int], prompt_logprobs: Sequence[SampledLogprob]
    ) -> dict[str, Any]:
        """Return the fields of a finished choice; what is not requested is null, as in vLLM."""
        ids = {"token_ids": list(token_ids) if self.returns_ids else None}
        return ids if self.is_chat else {**ids, **self._prompt_fields(index, prompt_logprobs)}

    def chunk_fields(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """Return the fields of a choice in one chunk, which may have no tokens."""
        return {"token_ids": list(token_ids)} if self.returns_ids else {}

    def first_chunk_fields(self, index: int) -> dict[str, Any]:
        """Return the fields of a choice in its first chunk."""
        if not self.returns_ids:
            return {}
        return {"prompt_token_ids": list(self.prompts[index]), "token_ids": []}

    def _prompt_fields(
        self, index: int, prompt_logprobs: Sequence[SampledLogprob]
    ) -> dict[str, Any]:
        logprobs = None
        if self.n_prompt_logprobs is not None:
            logprobs = [None, *(self._vllm_entry(sampled) for sampled in prompt_logprobs)]
        ids = list(self.prompts[index]) if self.returns_ids else None
        return {"prompt_logprobs": logprobs, "prompt_token_ids": ids}

    def _vllm_entry(self, sampled: SampledLogprob) -> dict[str, Any]:
        """Return the candidates of one position by token ID; the prompt's own is always there."""
        assert self.token_bytes is not None
        ranked = dict(sampled.top_logprobs[: self.n_prompt_logprobs])
        ranks = {token: rank for rank, (token, _) in enumerate(sampled.top_logprobs, start=1)}
        return {
            str(token): {
                "logprob": logprob,
                "rank": ranks.get(token),
                "decoded_token": self.token_bytes(token).decode(errors="replace"),
            }
            for token, logprob in {sampled.token: sampled.logprob, **ranked}.items()
        }


def text_offsets(token_ids: Sequence[int], token_bytes: TokenBytes) -> list[int]:
    """Return the offset in characters at which the text of each token starts."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, n_characters = [], 0
    for token in token_ids:
        offsets.append(n_characters)
        n_characters += len(decoder.decode(token_bytes(token)))
    return offsets
