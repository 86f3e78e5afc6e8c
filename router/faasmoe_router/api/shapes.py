"""How each kind of completion tells its choices, whole or as a stream's pieces."""

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from faasmoe_router.api.calling import Calling
from faasmoe_router.api.logprobs import TokenBytes, Told, chat_logprobs, completion_logprobs
from faasmoe_router.engine.ending import StopReason
from faasmoe_router.engine.generation import Delta
from faasmoe_router.toolcalls.parser import CallArguments, CallBegun, CallParser, Content, Piece

_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(slots=True)
class Choice:
    """One sequence of an answer, as far as it has come."""

    text: str = ""
    n_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: StopReason | None = None
    n_cached_tokens: int | None = None
    told: list[Any] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Append a step."""
        self.count(delta)
        self.text += delta.text
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.told += delta.logprobs

    def count(self, delta: Delta) -> None:
        """Count a step's tokens."""
        self.n_tokens += delta.n_tokens
        if delta.n_cached_tokens is not None:
            self.n_cached_tokens = delta.n_cached_tokens


class Shape(Protocol):
    """How one kind of completion tells its choices."""

    prefix: str
    kind: str
    chunk_kind: str

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a stream tells first of a choice, if anything."""

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Return a choice's parts of a stream's next events, one for each event."""


class ChatShape:
    """Chat completions: messages and deltas of messages.

    Args:
        token_bytes: what a token stands for, for log-probabilities; None tells none.
        calling: how tools are called, if they are.
    """

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, token_bytes: TokenBytes | None = None, calling: Calling | None = None
    ) -> None:
        self._token_bytes = token_bytes
        self._calling = calling
        self._parsers: dict[int, CallParser] = {}

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        reason = choice.finish_reason
        if self._calling is not None:
            parser = self._calling.parser()
            pieces = [*parser.feed(choice.text), *parser.flush()]
            if calls := self._calls(pieces):
                content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
                message |= {"content": content or None, "tool_calls": calls}
            reason = self._reason(reason, n_calls=len(calls))
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.told),
            "finish_reason": reason,
            "stop_reason": choice.stop_reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        """Return the delta that tells the role."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Return a choice's deltas; the last one is empty."""
        said, reason = self._said(index, delta)
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        if logprobs is not None and not said:
            said = [{"content": ""}]
        pieces = [self._delta(index, part) for part in said]
        if logprobs is not None:
            pieces[0]["logprobs"] = logprobs
        if reason is not None:
            end = self._delta(index, {}, reason)
            pieces.append({**end, "stop_reason": delta.stop_reason})
        return pieces

    def _said(self, index: int, delta: Delta) -> tuple[list[dict[str, Any]], str | None]:
        if self._calling is None:
            return ([{"content": delta.text}] if delta.text else []), delta.finish_reason
        parser = self._parsers.setdefault(index, self._calling.parser())
        pieces = parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.flush()
        reason = self._reason(delta.finish_reason, n_calls=parser.n_calls)
        return [self._part(piece) for piece in pieces], reason

    def _part(self, piece: Piece) -> dict[str, Any]:
        """Return what a delta tells of a piece of text."""
        if isinstance(piece, Content):
            return {"content": piece.text}
        if isinstance(piece, CallArguments):
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        return {"tool_calls": [{"index": piece.index, **self._call(piece.name)}]}

    def _calls(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        calls = [self._call(piece.name) for piece in pieces if isinstance(piece, CallBegun)]
        for piece in pieces:
            if isinstance(piece, CallArguments):
                calls[piece.index]["function"]["arguments"] += piece.text
        return calls

    def _call(self, name: str) -> dict[str, Any]:
        assert self._calling is not None
        length = self._calling.form.id_length
        # Some templates take back ids of their own length only, of letters and digits.
        prefix = "call_" if length > len("call_") * 2 else ""
        call_id = prefix + "".join(
            secrets.choice(_ID_CHARACTERS) for _ in range(length - len(prefix))
        )
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    def _reason(self, reason: str | None, *, n_calls: int) -> str | None:
        # OpenAI says so too: a call of the one tool that was named ends with stop.
        named = self._calling is not None and self._calling.mode == "named"
        return "tool_calls" if n_calls and reason == "stop" and not named else reason

    def _logprobs(self, told: Told) -> dict[str, Any] | None:
        return None if self._token_bytes is None else chat_logprobs(told, self._token_bytes)

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class CompletionShape:
    """Text completions.

    Args:
        token_bytes: what a token stands for, for log-probabilities; None tells none.
        echoed: the prompt of each choice, where it is told ahead of the text.
    """

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self, token_bytes: TokenBytes | None = None, echoed: Sequence[str] | None = None
    ) -> None:
        self._token_bytes = token_bytes
        self._echoed = echoed

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""
        text = self._echo(index) + choice.text
        piece = self._piece(index, text, told=choice.told, reason=choice.finish_reason)
        return {**piece, "stop_reason": choice.stop_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the prompt, if it is told: text has no role."""
        return self._piece(index, self._echo(index)) if self._echoed else None

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Return pieces of text; the last one is empty."""
        pieces = []
        if delta.text or delta.logprobs:
            pieces.append(self._piece(index, delta.text, told=delta.logprobs))
        if delta.finish_reason is not None:
            end = self._piece(index, "", reason=delta.finish_reason)
            pieces.append({**end, "stop_reason": delta.stop_reason})
        return pieces

    def _echo(self, index: int) -> str:
        return self._echoed[index] if self._echoed else ""

    def _piece(
        self, index: int, text: str, *, told: Told = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if self._token_bytes is not None and (told or reason is None):
            offset = len(self._echo(index))
            logprobs = completion_logprobs(told, self._token_bytes, offset=offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
