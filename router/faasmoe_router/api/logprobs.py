"""Log-probabilities as OpenAI tells them: for chats, and in the older way for completions."""

from collections.abc import Callable, Sequence
from typing import Any

from faasmoe_router.engine.logprobs import TokenLogprob

TokenBytes = Callable[[int], bytes]
Told = Sequence[tuple[int, TokenLogprob]]


def chat_logprobs(told: Told, token_bytes: TokenBytes) -> dict[str, Any]:
    """Return a chat choice's `logprobs`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_bytes(token)
        return {
            "token": text.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(text),
        }

    content = [
        {
            **entry(found.token, found.logprob),
            "top_logprobs": [entry(token, logprob) for token, logprob in found.top],
        }
        for _, found in told
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Told, token_bytes: TokenBytes, *, offset: int) -> dict[str, Any]:
    """Return a completion choice's `logprobs`.

    Args:
        told: what was found for each token.
        token_bytes: what a token stands for.
        offset: the characters that come before the first token's text.
    """

    def name(token: int) -> str:
        text = token_bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)

    def top(found: TokenLogprob) -> dict[str, float]:
        # Reversed, so that of two tokens of one name the likelier is told.
        return {
            name(token): logprob
            for token, logprob in reversed([*found.top, (found.token, found.logprob)])
        }

    return {
        "tokens": [name(found.token) for _, found in told],
        "token_logprobs": [found.logprob for _, found in told],
        "top_logprobs": [top(found) for _, found in told],
        "text_offset": [offset + at for at, _ in told],
    }
