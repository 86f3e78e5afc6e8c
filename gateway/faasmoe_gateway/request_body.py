"""What the gateway reads of a body: the model, and what bounds the tokens of the answer."""

from __future__ import annotations

import asyncio
import json
import zlib
from dataclasses import dataclass
from typing import Any

from faasmoe_gateway.body_structure import MAX_CONTAINERS, MAX_VALUES, count_parts
from faasmoe_gateway.refusal import Refusal

MAX_BODY_BYTES = 8 << 20
INLINE_BYTES = 64 << 10  # parsed on the event loop; larger ones in a thread
MAX_CHOICES = 1024
_OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_PROMPT_FIELDS = ("messages", "prompt", "input")


@dataclass(frozen=True, slots=True)
class RequestedWork:
    """What a body asks for.

    Attributes:
        model: the model's name; None if it names none.
        n_bytes: bytes of the body, which bound the tokens of its prompts.
        max_output_tokens: the most tokens of one choice; None if it does not say.
        n_choices: choices of each prompt.
        session: what the client calls its session; empty for none.
        prefix: the beginning of the prompt.
    """

    model: str | None
    n_bytes: int
    max_output_tokens: int | None = None
    n_choices: int = 1
    session: str = ""
    prefix: bytes = b""


async def read_work(body: bytes, *, encoding: str) -> RequestedWork:
    """Return what a body asks for.

    Args:
        body: as it was sent.
        encoding: its Content-Encoding; empty for none.

    Raises:
        Refusal: it is no JSON object, too large, of too many parts, or encoded in a way that the
            gateway cannot read.
    """
    if len(body) <= INLINE_BYTES:
        return _parse(body, encoding)
    return await asyncio.to_thread(_parse, body, encoding)


def _parse(body: bytes, encoding: str) -> RequestedWork:
    text = _decoded(body, encoding)
    if json.detect_encoding(text) not in ("utf-8", "utf-8-sig"):  # parts of others are not counted
        raise _invalid("body: got another encoding of text, expected UTF-8")
    parts = count_parts(text)
    if not parts.is_within_limits:
        raise Refusal(
            f"body: got {parts.n_values} values and {parts.n_containers} objects and lists, "
            f"expected at most {MAX_VALUES} and {MAX_CONTAINERS}",
            status=413,
            code="request_too_large",
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _invalid("body: got no JSON object, expected one")
    model = value.get("model")
    if model is not None and not isinstance(model, str):
        raise _invalid("model: got no text, expected the name of a model", "model")
    outputs = [_count(value, name) for name in _OUTPUT_FIELDS]
    session = value.get("prompt_cache_key")
    return RequestedWork(
        model,
        len(text),
        next((n for n in outputs if n is not None), None),
        _choices(value),
        session if isinstance(session, str) else "",
        _prefix(value),
    )


def _decoded(body: bytes, encoding: str) -> bytes:
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refusal(
            f"content-encoding: got {encoding[:40]!r}, expected gzip, deflate or none",
            status=415,
            code="unsupported_content_encoding",
        )
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either header
    try:
        text = decoder.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise _invalid(f"body: got what is no {encoding}, expected content in it") from None
    if len(text) > MAX_BODY_BYTES:
        raise body_too_large()
    return text


def body_too_large() -> Refusal:
    """Return the refusal of a body that no model takes."""
    return Refusal(
        f"body: got more than {MAX_BODY_BYTES} bytes, expected fewer",
        status=413,
        code="request_too_large",
    )


def _invalid(message: str, param: str | None = None) -> Refusal:
    return Refusal(message, status=400, code="invalid_value", param=param)


def _count(value: dict[str, Any], name: str) -> int | None:
    """Return a count if it is one; the router says what is wrong with others."""
    count = value.get(name)
    is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 0
    return count if is_count else None


def _choices(value: dict[str, Any]) -> int:
    prompts = value.get("prompt")
    n_prompts = len(prompts) if isinstance(prompts, list) and prompts else 1
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], int):
        n_prompts = 1  # one prompt of token IDs
    choices = max(_count(value, "n") or 1, _count(value, "best_of") or 1)
    return min(MAX_CHOICES, choices * n_prompts)


def _prefix(value: dict[str, Any]) -> bytes:
    """Return the beginning of a conversation, whose later turns begin with it as well."""
    prompt = next((value[name] for name in _PROMPT_FIELDS if name in value), "")
    first = prompt[:1] if isinstance(prompt, list) else prompt
    system = value.get("system", value.get("instructions", ""))
    return json.dumps([system, first])[:4096].encode()
