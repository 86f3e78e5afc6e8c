"""Log-probabilities of a choice's tokens, in OpenAI's form of chats and in its legacy form."""

from collections.abc import Sequence
from typing import Any

from faasmoe_router.api.token_details import TokenBytes, TokenName, token_id_name
from faasmoe_router.engine.sampler import SampledLogprob

OffsetLogprobs = Sequence[tuple[int, SampledLogprob]]
"""Log-probabilities of tokens, each with the offset in characters of its text in the choice."""


def to_chat_logprobs(
    token_logprobs: OffsetLogprobs,
    token_bytes: TokenBytes,
    *,
    n_top: int | None = None,
    as_ids: bool = False,
) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice, or of one chunk of it.

    Args:
        token_logprobs: the log-probabilities of each token.
        token_bytes: returns the bytes that a token stands for.
        n_top: candidates per token; None for all that were computed.
        as_ids: whether tokens are named by their IDs.
    """

    def token_entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_bytes(token)
        return {
            "token": token_id_name(token) if as_ids else text.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(text),
        }

    token_entries = [
        {
            **token_entry(sampled.token, sampled.logprob),
            "top_logprobs": [token_entry(*candidate) for candidate in sampled.top_logprobs[:n_top]],
        }
        for _, sampled in token_logprobs
    ]
    return {"content": token_entries, "refusal": None}


def to_completion_logprobs(
    token_logprobs: OffsetLogprobs,
    token_name: TokenName,
    *,
    first_text_offset: int,
    n_top: int | None = None,
) -> dict[str, Any]:
    """Return the `logprobs` of a text choice, or of one chunk of it, in OpenAI's legacy form.

    Args:
        token_logprobs: the log-probabilities of each token.
        token_name: returns how a token is written.
        first_text_offset: characters of the choice before its generated text (an echoed prompt).
        n_top: candidates per token; None for all that were computed.
    """

    def top_logprobs(sampled: SampledLogprob) -> dict[str, float]:
        # Reversed: if two tokens have the same text, the likelier one wins.
        return {
            token_name(token): logprob
            for token, logprob in reversed(
                [*sampled.top_logprobs[:n_top], (sampled.token, sampled.logprob)]
            )
        }

    return {
        "tokens": [token_name(sampled.token) for _, sampled in token_logprobs],
        "token_logprobs": [sampled.logprob for _, sampled in token_logprobs],
        "top_logprobs": [top_logprobs(sampled) for _, sampled in token_logprobs],
        "text_offset": [first_text_offset + offset for offset, _ in token_logprobs],
    }
