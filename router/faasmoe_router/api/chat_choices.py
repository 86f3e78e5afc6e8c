"""Choices of chat completions: messages, or deltas of messages."""

import json
import string
from collections.abc import Sequence
from typing import Any

from faasmoe_router.api.choice_logprobs import OffsetLogprobs, to_chat_logprobs
from faasmoe_router.api.choices import ChoiceState, with_finish_reason
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.reasoning import MessageFormat
from faasmoe_router.api.token_details import TokenBytes
from faasmoe_router.api.tool_params import CUSTOM_TOOL_INPUT
from faasmoe_router.engine.generation import CompletionOutput
from faasmoe_router.toolcalls.message import AnyMessageParser, MessageEvent
from faasmoe_router.toolcalls.parser import ContentDelta, ToolCallArgumentsDelta, ToolCallStart
from faasmoe_router.toolcalls.reasoning import ReasoningDelta

_CALL_ID_CHARACTERS = string.ascii_letters + string.digits


class ChatChoiceFormatter:
    """Formats chat completions: messages, or deltas of messages.

    Args:
        token_bytes: returns the bytes of a token, for log-probabilities; None reports none.
        message_format: how reasoning and tool calls are found in the text.
        n_top: candidates per token in log-probabilities.
        as_ids: whether log-probabilities name tokens by their IDs.
        origin: of the ids of tool calls.
        echoed: text that precedes the content of each message.
    """

    id_prefix = "chatcmpl"
    object_type = "chat.completion"
    chunk_object_type = "chat.completion.chunk"

    def __init__(
        self,
        token_bytes: TokenBytes | None = None,
        message_format: MessageFormat | None = None,
        *,
        n_top: int | None = None,
        as_ids: bool = False,
        origin: Origin | None = None,
        echoed: str = "",
    ) -> None:
        self._token_bytes = token_bytes
        self._n_top = n_top
        self._as_ids = as_ids
        self._origin = origin or Origin()
        self._echoed = echoed
        self._n_calls = 0
        self._format = message_format or MessageFormat()
        self._tool_config = self._format.tool_config
        self._parsers: dict[int, AnyMessageParser] = {}
        self._counters: dict[int, AnyMessageParser] = {}
        self._custom_calls: dict[tuple[int, int], str] = {}  # (choice, call) -> arguments so far

    def format_choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        """Return a choice with its message; reasoning and tool calls are parsed from the text."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        finish_reason = choice.finish_reason
        if not self._format.is_plain:
            parser = self._format.new_parser()
            events = [*parser.feed(choice.text), *parser.flush()]
            message |= self._message_parts(events, choice.text)
            n_calls = len(message.get("tool_calls", ()))
            finish_reason = self._finish_reason(finish_reason, n_calls=n_calls)
        if self._echoed:
            message["content"] = self._echoed + (message["content"] or "")
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _message_parts(self, events: Sequence[MessageEvent], text: str) -> dict[str, Any]:
        """Return the fields of a message that its events make up; without any it is its text."""
        content = "".join(event.text for event in events if isinstance(event, ContentDelta))
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
        tool_calls = self._tool_calls(events)
        if not (tool_calls or self._format.has_reasoning):
            return {"content": text}
        is_empty_answer = not (content or tool_calls or reasoning)
        parts: dict[str, Any] = {"content": "" if is_empty_answer else content or None}
        if tool_calls:
            parts["tool_calls"] = tool_calls
        if reasoning and self._format.includes_reasoning:
            parts |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return parts

    def count_reasoning_tokens(self, index: int, output: CompletionOutput) -> int:
        """Return how many tokens of new output are reasoning; to be called once per output."""
        if not self._format.has_reasoning:
            return 0
        if (counter := self._counters.get(index)) is None:
            counter = self._counters[index] = self._format.new_parser()
        was_reasoning = counter.is_reasoning
        counter.feed(output.text)
        return output.n_tokens if was_reasoning or counter.is_reasoning else 0

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the delta that sets the role, with the echoed text."""
        return self._chunk_choice(index, {"role": "assistant", "content": self._echoed})

    def format_chunks(self, index: int, output: CompletionOutput) -> list[dict[str, Any]]:
        """Return a choice's deltas; the last one has the finish reason."""
        message_deltas, finish_reason = self._message_deltas(index, output)
        logprobs = self._logprobs(output.logprobs) if output.logprobs else None
        if logprobs is not None and not message_deltas:
            message_deltas = [{"content": ""}]
        chunks = [self._chunk_choice(index, delta) for delta in message_deltas]
        if logprobs is not None:
            chunks[0]["logprobs"] = logprobs
        if finish_reason is not None:
            last = chunks.pop() if chunks else self.empty_chunk(index)
            chunks.append(with_finish_reason(last, finish_reason, output.stop_reason))
        return chunks

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """Return an empty delta."""
        return self._chunk_choice(index, {})

    def _message_deltas(
        self, index: int, output: CompletionOutput
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return the message deltas of new output, and its finish reason if it has one."""
        if self._format.is_plain:
            return ([{"content": output.text}] if output.text else []), output.finish_reason
        if (parser := self._parsers.get(index)) is None:
            parser = self._parsers[index] = self._format.new_parser()
        events = [*parser.feed(output.text)]
        if output.finish_reason is not None:
            events += parser.flush()
        finish_reason = self._finish_reason(output.finish_reason, n_calls=parser.n_calls)
        deltas = [delta for event in events if (delta := self._message_delta(index, event))]
        if output.finish_reason is not None:
            deltas += self._custom_inputs(index)
        return deltas, finish_reason

    def _message_delta(self, choice: int, event: MessageEvent) -> dict[str, Any] | None:
        """Return the delta of an event; None for what is held back or not to be told."""
        if isinstance(event, ReasoningDelta):
            fields = {"reasoning": event.text, "reasoning_content": event.text}
            return fields if self._format.includes_reasoning else None
        if isinstance(event, ContentDelta):
            return {"content": event.text}
        if isinstance(event, ToolCallArgumentsDelta):
            if (choice, event.index) in self._custom_calls:
                self._custom_calls[choice, event.index] += event.text
                return None
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        call = self._new_tool_call(event.name)
        if call["type"] == "custom":
            self._custom_calls[choice, event.index] = ""
        return {"tool_calls": [{"index": event.index, **call}]}

    def _custom_inputs(self, choice: int) -> list[dict[str, Any]]:
        """Return the deltas of a finished choice's custom calls: their inputs."""
        return [
            {"tool_calls": [{"index": call, "custom": {"input": _custom_input(arguments)}}]}
            for (of_choice, call), arguments in self._custom_calls.items()
            if of_choice == choice
        ]

    def _tool_calls(self, events: Sequence[MessageEvent]) -> list[dict[str, Any]]:
        tool_calls = [
            self._new_tool_call(event.name) for event in events if isinstance(event, ToolCallStart)
        ]
        arguments = [""] * len(tool_calls)
        for event in events:
            if isinstance(event, ToolCallArgumentsDelta):
                arguments[event.index] += event.text
        for call, text in zip(tool_calls, arguments, strict=True):
            if call["type"] == "custom":
                call["custom"]["input"] = _custom_input(text)
            else:
                call["function"]["arguments"] = text
        return tool_calls

    def _new_tool_call(self, name: str) -> dict[str, Any]:
        config = self._tool_config
        length = 24 if config is None else config.call_id_length
        # Some chat templates accept call ids of a fixed length only, of letters and digits.
        prefix = "call_" if length > len("call_") * 2 else ""
        self._n_calls += 1
        call_id = prefix + self._origin.characters(
            _CALL_ID_CHARACTERS, length - len(prefix), "call", self._n_calls
        )
        if config is not None and name in config.custom_tools:
            return {"id": call_id, "type": "custom", "custom": {"name": name, "input": ""}}
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    def _finish_reason(self, reason: str | None, *, n_calls: int) -> str | None:
        # As OpenAI does: a call of a tool that the request named finishes with "stop".
        is_named = self._tool_config is not None and self._tool_config.choice_mode == "named"
        return "tool_calls" if n_calls and reason == "stop" and not is_named else reason

    def _logprobs(self, token_logprobs: OffsetLogprobs) -> dict[str, Any] | None:
        if self._token_bytes is None:
            return None
        return to_chat_logprobs(
            token_logprobs, self._token_bytes, n_top=self._n_top, as_ids=self._as_ids
        )

    def _chunk_choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _custom_input(arguments: str) -> str:
    """Return the text in the arguments of a custom call; the arguments if there is none."""
    try:
        value = json.loads(arguments)[CUSTOM_TOOL_INPUT]
    except (ValueError, KeyError, TypeError):
        return arguments
    return value if isinstance(value, str) else arguments
