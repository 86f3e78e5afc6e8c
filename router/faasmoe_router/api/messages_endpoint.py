"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, translated onto chats."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from faasmoe_router.api.errors import (
    ClientDisconnected,
    anthropic_error,
    from_router_error,
    internal_error,
    invalid_value,
    unsupported_param,
)
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.protocol import CHAT_EXTENSIONS, MAX_TOOLS
from faasmoe_router.api.rendering import PartDelta, event_frame, message_parts
from faasmoe_router.api.streaming import log_stream_failure
from faasmoe_router.api.validation import MAX_MESSAGES, RequestModel, Text, reject_unsupported
from faasmoe_router.errors import RouterError

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "response_format": ({"type": "text"},),
}
_SAME = ("model", "temperature", "top_p", "top_k", "stream")
_STOP_REASONS: Mapping[str, str] = {"length": "max_tokens", "tool_calls": "tool_use"}
_TOOL_CHOICES: Mapping[str, str] = {"auto": "auto", "any": "required", "none": "none"}


class MessageParam(RequestModel):
    """One message: text, or a list of content blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountTokensRequest(RequestModel):
    """The body of POST /v1/messages/count_tokens, and the prompt of POST /v1/messages."""

    unsupported_parameters = _UNSUPPORTED
    known_extra = frozenset(CHAT_EXTENSIONS)

    messages: list[MessageParam] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    model: Text | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None

    def to_chat(self) -> dict[str, Any]:
        """Return the body of the same request to chat completions; raises ApiError."""
        extra = self.model_extra or {}
        reject_unsupported(extra, _UNSUPPORTED)
        chat = {name: extra[name] for name in CHAT_EXTENSIONS if name in extra}
        chat |= {"messages": list(self._messages()), "model": self.model}
        if self.tools:
            chat["tools"] = [_chat_tool(tool, index) for index, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            chat |= _chat_tool_choice(self.tool_choice)
        if self.thinking is not None:
            is_enabled = self.thinking.get("type") != "disabled"
            given = chat.get("chat_template_kwargs") or {}
            if isinstance(given, dict):  # otherwise the chat names it
                chat["chat_template_kwargs"] = {"enable_thinking": is_enabled, **given}
        return chat

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system:
            yield {"role": "system", "content": _text(self.system, path="system")}
        for index, message in enumerate(self.messages):
            yield from _chat_messages(message, path=f"messages[{index}]")


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None

    def to_chat(self) -> dict[str, Any]:
        """Return the body of the same request to chat completions; raises ApiError."""
        chat = super().to_chat()
        chat |= {name: v for name in _SAME if (v := getattr(self, name)) is not None}
        chat["max_completion_tokens"] = self.max_tokens
        if self.stop_sequences:
            chat["stop"] = self.stop_sequences
        text_format = self.output_format or (self.output_config or {}).get("format")
        if text_format is not None:
            schema = text_format.get("schema") if isinstance(text_format, dict) else None
            spec = {"name": "output", "schema": schema}
            chat["response_format"] = {"type": "json_schema", "json_schema": spec}
        if self.stream:
            options = {"include_usage": True, "continuous_usage_stats": True}
            chat["stream_options"] = options
        return chat


def _text(value: Any, *, path: str) -> str:
    """Return the text of a string or of text blocks; raises ApiError."""
    if isinstance(value, str) or value is None:
        return value or ""
    texts = []
    for index, block in enumerate(value if isinstance(value, list) else [value]):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise invalid_value(f"{path}[{index}]", f"expected a text block, got {kind!r}")
        texts.append(block["text"])
    return "\n".join(texts)


def _chat_messages(message: MessageParam, *, path: str) -> Iterator[dict[str, Any]]:
    """Yield the messages of a chat: results of tools are messages of their own, and come first."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    chat: dict[str, Any] = {"role": message.role, "content": None}
    texts: list[str] = []
    for index, block in enumerate(message.content):
        block_path, kind = f"{path}.content[{index}]", block.get("type")
        if kind == "text":
            texts.append(_text([block], path=block_path))
        elif kind == "tool_result":
            content = _text(block.get("content"), path=f"{block_path}.content")
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            call = {"id": block.get("id"), "type": "function", "function": function}
            chat.setdefault("tool_calls", []).append(call)
        elif kind == "thinking":
            chat["reasoning"] = chat.get("reasoning", "") + str(block.get("thinking", ""))
        elif kind != "redacted_thinking":
            raise unsupported_param(f"{block_path}.type", f"is not supported here: got {kind!r}")
    if texts or "tool_calls" in chat:
        yield {**chat, "content": "\n".join(texts) if texts else None}


def _chat_tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise unsupported_param(f"tools[{index}].type", f"is not supported here: got {kind!r}")
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {
        "type": "function",
        "function": {**function, "parameters": tool.get("input_schema")},
    }


def _chat_tool_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(choice.get("type"))
    fields: dict[str, Any] = {}
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    if kind == "tool":
        function = {"name": choice.get("name")}
        return {**fields, "tool_choice": {"type": "function", "function": function}}
    if kind not in _TOOL_CHOICES:
        raise invalid_value("tool_choice.type", f"expected auto, any, tool or none, got {kind!r}")
    return {**fields, "tool_choice": _TOOL_CHOICES[kind]}


class MessagesRendering:
    """Writes a chat's response as a message, or as its events.

    Args:
        origin: of its id.
    """

    def __init__(self, origin: Origin) -> None:
        self._id = f"msg_{origin.hex_id('response')}"

    def body(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the message of a whole chat."""
        [choice] = response["choices"]
        content = [_block(part) for part in message_parts(choice["message"])]
        return self._message(
            response["model"],
            content=content or [{"type": "text", "text": ""}],
            usage=_usage(response["usage"]),
            **_stop_fields(choice, has_calls=any(b["type"] == "tool_use" for b in content)),
        )

    async def frames(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        """Yield the events of a stream; a failure is the last one."""
        blocks, is_started = _Blocks(), False
        last: Mapping[str, Any] = {}
        usage: Mapping[str, Any] = {}
        try:
            async for chunk in chunks:
                usage = chunk.get("usage") or usage
                if not is_started:
                    is_started = True
                    message = self._message(
                        chunk["model"],
                        content=[],
                        usage=_usage(usage),
                        stop_reason=None,
                        stop_sequence=None,
                    )
                    yield event_frame({"type": "message_start", "message": message})
                for choice in chunk["choices"]:
                    for part in message_parts(choice["delta"]):
                        for event in blocks.add(part):
                            yield event_frame(event)
                    if choice["finish_reason"] is not None:
                        last = choice
            for event in blocks.close():
                yield event_frame(event)
            delta = _stop_fields(last, has_calls=blocks.has_calls)
            yield event_frame({"type": "message_delta", "delta": delta, "usage": _usage(usage)})
            yield event_frame({"type": "message_stop"})
        except ClientDisconnected:
            return
        except RouterError as error:
            yield event_frame(anthropic_error(from_router_error(error)))
        except Exception:
            log_stream_failure()
            yield event_frame(anthropic_error(internal_error()))

    def _message(self, model: str, **fields: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": model,
            **fields,
        }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    details = usage.get("prompt_tokens_details") or {}
    n_read, n_created = details.get("cached_tokens", 0), details.get("cache_write_tokens", 0)
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - n_read - n_created,
        "cache_read_input_tokens": n_read,
        "cache_creation_input_tokens": n_created,
        "output_tokens": usage.get("completion_tokens", 0),
    }


def _stop_fields(choice: Mapping[str, Any], *, has_calls: bool) -> dict[str, Any]:
    stop = choice.get("stop_reason")
    reason = _STOP_REASONS.get(choice.get("finish_reason") or "", "end_turn")
    if isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    if has_calls and reason == "end_turn":
        reason = "tool_use"  # a named tool ends a chat with `stop`
    return {"stop_reason": reason, "stop_sequence": None}


def _block(part: PartDelta) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    if part.kind == "text":
        return {"type": "text", "text": part.text}
    call = part.call or {}
    return {**_empty_call(call), "input": _arguments(part.text)}


def _empty_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}


def _arguments(text: str) -> Any:
    """Return a call's arguments; a call that `max_tokens` cut short has none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _Blocks:
    """The content blocks of one stream.

    Attributes:
        has_calls: whether any of them is a call.
    """

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None
        self.has_calls = False

    def add(self, part: PartDelta) -> Iterator[dict[str, Any]]:
        """Yield the events of a part's growth."""
        if part.kind != self._open or part.call is not None:
            yield from self.close()
            yield self._start(part)
        if not part.text:
            return
        deltas = {
            "reasoning": {"type": "thinking_delta", "thinking": part.text},
            "text": {"type": "text_delta", "text": part.text},
            "call": {"type": "input_json_delta", "partial_json": part.text},
        }
        yield {
            "type": "content_block_delta",
            "index": self._index,
            "delta": deltas[part.kind],
        }

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the event that ends the open block, if there is one."""
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _start(self, part: PartDelta) -> dict[str, Any]:
        self._index += 1
        self._open = part.kind
        self.has_calls = self.has_calls or part.kind == "call"
        empty = {
            "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
            "text": {"type": "text", "text": ""},
        }
        block = empty[part.kind] if part.kind != "call" else _empty_call(part.call or {})
        return {"type": "content_block_start", "index": self._index, "content_block": block}
