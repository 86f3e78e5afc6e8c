"""How a chat's response is written: as OpenAI's chat completion, or translated.

A `Rendering` receives the chat's response, whole or as chunks. The translations need the parts of a
streamed message in order: `message_parts` tells where each starts and how it grows.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from faasmoe_router.api.streaming import sse_frames
from faasmoe_router.api.token_details import text_offsets

PartKind = Literal["reasoning", "text", "call"]


class Rendering(Protocol):
    """Writes the response of one chat."""

    def body(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the body of a whole response."""

    def frames(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        """Return the server-sent events of a stream."""


class PlainRendering:
    """Writes responses as they are."""

    def body(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the response."""
        return response

    def frames(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        """Return one event per chunk."""
        return sse_frames(chunks)


@dataclass(frozen=True, slots=True)
class PartDelta:
    """Growth of a part of a message.

    Attributes:
        kind: what the part is.
        text: its new text: of reasoning or content, or of a call's arguments.
        call: the call's id, name and type if the delta starts one; else None.
        logprobs: entries of the log-probabilities of a text's tokens, as in chats.
    """

    kind: PartKind
    text: str
    call: Mapping[str, Any] | None = None
    logprobs: Sequence[Mapping[str, Any]] = ()


def message_parts(
    delta: Mapping[str, Any], logprobs: Sequence[Mapping[str, Any]] = ()
) -> Iterator[PartDelta]:
    """Yield the growth of parts in the delta of one chunk, or in a whole message.

    Args:
        delta: the delta, or the message.
        logprobs: entries of its text's log-probabilities.
    """
    if delta.get("reasoning"):
        yield PartDelta("reasoning", delta["reasoning"])
    if delta.get("content"):
        yield PartDelta("text", delta["content"], logprobs=logprobs)
    for call in delta.get("tool_calls") or ():
        tool = call.get("function") or call.get("custom") or {}
        start = None
        if "id" in call:
            start = {"id": call["id"], "type": call["type"], "name": tool["name"]}
        yield PartDelta("call", tool.get("arguments") or tool.get("input") or "", start)


def text_logprobs(choice: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the entries of a whole choice's log-probabilities that are of its content.

    The others are of its reasoning and its calls.
    """
    entries = (choice.get("logprobs") or {}).get("content") or ()
    message = choice["message"]
    if not (message.get("reasoning") or message.get("tool_calls")):
        return entries
    texts = [bytes(entry["bytes"]) for entry in entries]
    content = message["content"] or ""
    start = b"".join(texts).decode(errors="replace").rfind(content)
    if not content or start < 0:
        return ()
    offsets = text_offsets(range(len(texts)), texts.__getitem__)
    within = range(start, start + len(content))
    return [entry for entry, offset in zip(entries, offsets, strict=True) if offset in within]


def event_frame(event: Mapping[str, Any]) -> bytes:
    """Return the frame of an event that is named by its `type`."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()
