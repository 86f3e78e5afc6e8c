"""The output items of OpenAI's responses, and the events by which they grow."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from faasmoe_router.api.origin import Origin
from faasmoe_router.api.rendering import PartDelta, message_parts

_Event = dict[str, Any]
_ItemKind = Literal["reasoning", "message", "function_call", "custom_tool_call"]


class OutputItems:
    """The output items of one response, and the events by which they grow.

    Args:
        origin: of their ids.

    Attributes:
        items: the items so far; the last may be open.
    """

    def __init__(self, origin: Origin) -> None:
        self.items: list[dict[str, Any]] = []
        self._ids = origin.hex_ids("item")
        self._open: _ItemKind | None = None
        self._text = ""
        self._logprobs: list[Mapping[str, Any]] = []
        self._untold: list[Mapping[str, Any]] = []

    def add_delta(
        self, delta: Mapping[str, Any], logprobs: Sequence[Mapping[str, Any]]
    ) -> Iterator[_Event]:
        """Add the delta of a chunk; yield its events.

        Log-probabilities of tokens whose text is held back are told with the text.
        """
        self._untold += logprobs
        for part in message_parts(delta, self._untold):
            self._untold = []
            yield from self.add(part)

    def add(self, part: PartDelta) -> Iterator[_Event]:
        """Add the growth of a part; yield its events."""
        kind = _item_kind(part, self._open)
        if kind != self._open or part.call is not None:
            yield from self.close()
            yield from self._start(kind, part)
        self._text += part.text
        self._logprobs += part.logprobs
        if part.text and kind != "custom_tool_call":
            logprobs = {"logprobs": list(part.logprobs)} if kind == "message" else {}
            yield self._event(_DELTA_EVENTS[kind], delta=part.text, **logprobs)

    def close(self, *, is_cut: bool = False) -> Iterator[_Event]:
        """Finish the open item, if there is one; yield its events.

        Args:
            is_cut: whether the response ends within it.
        """
        if self._open is None:
            return
        kind, item, text = self._open, self.items[-1], self._text
        self._open = None
        item["status"] = "incomplete" if is_cut else "completed"
        if kind == "message":
            part = _text_part(text, self._logprobs)
            item["content"] = [part]
            yield self._event("response.output_text.done", text=text, logprobs=part["logprobs"])
            yield self._event("response.content_part.done", part=part)
        elif kind == "reasoning":
            item["content"] = [_reasoning_part(text)]
            yield self._event("response.reasoning_text.done", text=text)
            yield self._event("response.content_part.done", part=_reasoning_part(text))
        elif kind == "function_call":
            item["arguments"] = text
            yield self._event(
                "response.function_call_arguments.done", arguments=text, name=item["name"]
            )
        else:
            item["input"] = text
            yield self._event("response.custom_tool_call_input.done", input=text)
        index = len(self.items) - 1
        yield {"type": "response.output_item.done", "output_index": index, "item": item}

    def _start(self, kind: _ItemKind, part: PartDelta) -> Iterator[_Event]:
        item = _new_item(kind, part, next(self._ids))
        self.items.append(item)
        self._open, self._text, self._logprobs = kind, "", []
        index = len(self.items) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": dict(item)}
        if kind in ("message", "reasoning"):
            part_of = _text_part if kind == "message" else _reasoning_part
            yield self._event("response.content_part.added", part=part_of(""))

    def _event(self, event_type: str, **fields: Any) -> _Event:
        index = len(self.items) - 1
        event = {
            "type": event_type,
            "item_id": self.items[-1]["id"],
            "output_index": index,
            **fields,
        }
        if "call" not in event_type:
            event["content_index"] = 0
        return event


_DELTA_EVENTS: Mapping[str, str] = {
    "message": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "function_call": "response.function_call_arguments.delta",
}


def _item_kind(part: PartDelta, open_kind: _ItemKind | None) -> _ItemKind:
    if part.kind == "reasoning":
        return "reasoning"
    if part.kind == "text":
        return "message"
    if part.call is None and open_kind in ("function_call", "custom_tool_call"):
        return open_kind
    is_custom = part.call is not None and part.call["type"] == "custom"
    return "custom_tool_call" if is_custom else "function_call"


def _text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _new_item(kind: _ItemKind, part: PartDelta, identity: str) -> dict[str, Any]:
    if kind == "message":
        item = {"id": f"msg_{identity}", "role": "assistant", "content": []}
    elif kind == "reasoning":
        item = {"id": f"rs_{identity}", "summary": [], "content": []}
    else:
        call = part.call or {"id": identity, "name": ""}
        item = {"id": f"fc_{identity}", "call_id": call["id"], "name": call["name"]}
        item |= {"arguments": ""} if kind == "function_call" else {"input": ""}
    return {"type": kind, "status": "in_progress", **item}
