"""POST /v1/responses: OpenAI's Responses API, stateless, translated to and from chats.

Nothing is stored: `store` and `previous_response_id` are refused by name, and a conversation is
sent whole as `input`. Tools that OpenAI would run itself are refused as well.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from pydantic import Field

from faasmoe_router.api.errors import (
    ApiError,
    ClientDisconnected,
    from_router_error,
    internal_error,
    invalid_value,
    unsupported_param,
)
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.protocol import CHAT_EXTENSIONS, MAX_TOOLS
from faasmoe_router.api.rendering import event_frame, message_parts, text_logprobs
from faasmoe_router.api.response_items import OutputItems
from faasmoe_router.api.streaming import log_stream_failure
from faasmoe_router.api.structured_outputs import is_json
from faasmoe_router.api.validation import RequestModel, Text, reject_unsupported
from faasmoe_router.engine.sampler import MAX_TOP_LOGPROBS
from faasmoe_router.errors import RouterError

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "enable_response_messages": (False,),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
}
_STANDARD = ("model", "temperature", "top_p", "parallel_tool_calls", "stream")
# Parameters that mean the same in a chat.
_SAME = (*_STANDARD, *CHAT_EXTENSIONS, "stop", "top_k")
_LOGPROBS = "message.output_text.logprobs"
_ECHOED = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata", "user")
_TEXT_PARTS = ("input_text", "output_text", "text")


class ResponsesRequest(RequestModel):
    """The body of POST /v1/responses."""

    unsupported_parameters = _UNSUPPORTED
    known_extra = frozenset((*_SAME, *_ECHOED))

    input: str | list[dict[str, Any]]
    model: Text | None = None
    instructions: Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    stream: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def to_chat(self) -> dict[str, Any]:
        """Return the body of the same request to chat completions; raises ApiError."""
        extra = self.model_extra or {}
        reject_unsupported(extra, _UNSUPPORTED)
        for name in (*_ECHOED, "tools", "tool_choice", "text", "reasoning"):
            if not is_json(self._value(name)):  # the response repeats it
                raise invalid_value(name, "expected valid JSON")
        chat = {name: v for name in _SAME if (v := self._value(name)) is not None}
        chat["messages"] = self._messages()
        if self.max_output_tokens is not None:
            chat["max_completion_tokens"] = self.max_output_tokens
        if self.tools:
            chat["tools"] = [_chat_tool(tool, index) for index, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            chat["tool_choice"] = _chat_tool_choice(self.tool_choice)
        if self.text and self.text.get("format"):
            chat["response_format"] = _response_format(self.text["format"])
        if self.reasoning and self.reasoning.get("effort"):
            chat["reasoning_effort"] = self.reasoning["effort"]
        if self.top_logprobs or _LOGPROBS in (self.include or ()):
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.stream:
            chat["stream_options"] = {"include_usage": True}
        return chat

    def _value(self, name: str) -> Any:
        return (
            getattr(self, name, None)
            if name in type(self).model_fields
            else ((self.model_extra or {}).get(name))
        )

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for index, item in enumerate(self.input):
            _add_item(messages, item, path=f"input[{index}]")
        # Reasoning that no text or call follows is not an answer.
        return [m for m in messages if m.keys() != {"role", "content", "reasoning"} or m["content"]]

    def response(self, **fields: Any) -> dict[str, Any]:
        """Return a response object that echoes this request."""
        return {
            "object": "response",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "parallel_tool_calls": self._value("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(self.reasoning or {})},
            "store": False,
            "text": {"format": {"type": "text"}, **(self.text or {})},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            "usage": None,
            **{name: self._value(name) for name in _ECHOED},
            "metadata": self._value("metadata") or {},
            **fields,
        }


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], *, path: str) -> None:
    """Append an input item to the messages; the parts of one answer become one message."""
    kind = item.get("type", "message")
    if kind == "message":
        content = _content(item.get("content"), path=f"{path}.content")
        message = {"role": item.get("role"), "content": content}
        if message["role"] == "assistant":
            _open_answer(messages, for_call=False)["content"] = content
        else:
            messages.append(message)
    elif kind in ("function_call", "custom_tool_call"):
        answer = _open_answer(messages, for_call=True)
        answer.setdefault("tool_calls", []).append(_chat_call(item, kind))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        output = _content(item.get("output"), path=f"{path}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "reasoning":
        reasoning = "\n".join([*_texts(item.get("content")), *_texts(item.get("summary"))])
        messages.append({"role": "assistant", "content": None, "reasoning": reasoning})
    else:
        raise unsupported_param(f"{path}.type", f"is not supported by this server: got {kind!r}")


def _texts(parts: Any) -> list[str]:
    """Return the texts of the parts of a reasoning item."""
    if not isinstance(parts, list):
        return []
    return [str(part.get("text", "")) for part in parts if isinstance(part, dict)]


def _open_answer(messages: list[dict[str, Any]], *, for_call: bool) -> dict[str, Any]:
    """Return the last message if it is an answer that the next item continues, or a new one."""
    last = messages[-1] if messages else {"role": None}
    is_empty = last["role"] == "assistant" and not (last["content"] or "tool_calls" in last)
    if not (is_empty or (for_call and last["role"] == "assistant")):
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _content(value: Any, *, path: str) -> Any:
    """Return the content of a message: text, or the parts of a chat; raises ApiError."""
    if not isinstance(value, list):
        return value
    parts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            parts.append(part)
        elif kind in _TEXT_PARTS:
            parts.append({"type": "text", "text": part.get("text")})
        else:
            raise invalid_value(f"{path}[{index}].type", f"expected a text, got {kind!r}")
    return parts


def _chat_call(item: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind == "custom_tool_call":
        custom = {"name": item.get("name"), "input": item.get("input")}
        return {"id": item.get("call_id"), "type": "custom", "custom": custom}
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _chat_tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in ("function", "custom"):
        raise unsupported_param(f"tools[{index}].type", f"is not supported here: got {kind!r}")
    return {"type": kind, kind: {name: v for name, v in tool.items() if name != "type"}}


def _chat_tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind in ("function", "custom"):
        return {"type": kind, kind: {"name": choice.get("name")}}
    if kind == "allowed_tools":
        named = choice.get("tools")
        tools = [_chat_tool_choice(t) for t in named] if isinstance(named, list) else None
        return {"type": kind, kind: {"mode": choice.get("mode"), "tools": tools}}
    raise unsupported_param("tool_choice", f"is not supported here: got type {kind!r}")


def _response_format(text_format: Any) -> Any:
    if not isinstance(text_format, dict) or text_format.get("type") != "json_schema":
        return text_format
    spec = {name: v for name, v in text_format.items() if name != "type"}
    return {"type": "json_schema", "json_schema": spec}


class ResponsesRendering:
    """Writes a chat's response as a response object, or as its events.

    Args:
        request: the request.
        origin: of its ids and time.
    """

    def __init__(self, request: ResponsesRequest, origin: Origin) -> None:
        self._request = request
        self._origin = origin
        self._id = f"resp_{origin.hex_id('response')}"
        self._created_s = origin.created_s

    def body(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the response object of a whole chat."""
        [choice] = response["choices"]
        items = OutputItems(self._origin)
        for part in message_parts(choice["message"], text_logprobs(choice)):
            for _ in items.add(part):
                pass
        for _ in items.close(is_cut=choice["finish_reason"] == "length"):
            pass
        return self._response(response, items, choice["finish_reason"], response["usage"])

    async def frames(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        """Yield the events of a stream; a failure is the last one."""
        number, items = 0, OutputItems(self._origin)
        started = False
        try:
            finish_reason, usage, chunk = None, None, {}
            async for chunk in chunks:
                events: list[dict[str, Any]] = []
                if not started:
                    started = True
                    initial = self._base(chunk, status="in_progress")
                    events += [
                        {"type": f"response.{name}", "response": initial}
                        for name in ("created", "in_progress")
                    ]
                for choice in chunk["choices"]:
                    logprobs = (choice["logprobs"] or {}).get("content", ())
                    events += items.add_delta(choice["delta"], logprobs)
                    finish_reason = choice["finish_reason"] or finish_reason
                usage = chunk.get("usage") or usage
                for event in events:
                    yield event_frame({**event, "sequence_number": number})
                    number += 1
            for event in items.close(is_cut=finish_reason == "length"):
                yield event_frame({**event, "sequence_number": number})
                number += 1
            done = self._response(chunk, items, finish_reason, usage or {})
            last: dict[str, Any] = {"type": f"response.{done['status']}", "response": done}
            yield event_frame({**last, "sequence_number": number})
        except ClientDisconnected:
            return
        except RouterError as error:
            yield self._failure(from_router_error(error), number)
        except Exception:
            log_stream_failure()
            yield self._failure(internal_error(), number)

    def _failure(self, error: ApiError, number: int) -> bytes:
        detail = {"code": error.code, "message": str(error)}
        failed = self._base({}, status="failed", error=detail)
        event = {"type": "response.failed", "response": failed, "sequence_number": number}
        return event_frame(event)

    def _base(self, source: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        return self._request.response(
            id=self._id,
            created_at=self._created_s,
            model=source.get("model", self._request.model),
            **fields,
        )

    def _response(
        self,
        source: Mapping[str, Any],
        items: OutputItems,
        finish_reason: str | None,
        usage: Mapping[str, Any],
    ) -> dict[str, Any]:
        is_cut = finish_reason == "length"
        return self._base(
            source,
            status="incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=items.items,
            usage=_usage(usage),
        )


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage.get("prompt_tokens", 0),
        "input_tokens_details": {
            "cached_tokens": prompt.get("cached_tokens", 0),
            "cache_write_tokens": prompt.get("cache_write_tokens", 0),
        },
        "output_tokens": usage.get("completion_tokens", 0),
        "output_tokens_details": {"reasoning_tokens": completion.get("reasoning_tokens", 0)},
        "total_tokens": usage.get("total_tokens", 0),
    }
