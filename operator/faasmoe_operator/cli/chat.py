"""`faasmoe chat`: a conversation with a running model, streamed, in the terminal.

Every answer is followed by what it took: whether it waited for functions, the first token, and the
tokens per second after it. Without a terminal it answers one message of standard input.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from faasmoe_operator.cli import kubectl_plugin, running_models
from faasmoe_operator.errors import CommandError

COLD_START_HEADER = "X-FaaSMoE-Cold-Start"
TIMEOUT_S = 600.0
PROMPT = "> "
FORGET = "/new"


@dataclass(slots=True)
class ChatSession:
    """A conversation.

    Attributes:
        url: the API's base URL, with /v1.
        model: the name that requests give; None if there is one only.
        api_key: the API key; empty for none.
        max_tokens: most tokens of an answer.
        messages: what has been said.
    """

    url: str
    model: str | None
    api_key: str
    max_tokens: int
    messages: list[dict[str, str]]

    def ask(self, text: str, write: Callable[[str], object]) -> str:
        """Send a message, write its answer as it arrives, and return what it took.

        Raises:
            CommandError: the server refuses it or does not answer.
        """
        self.messages.append({"role": "user", "content": text})
        timing = _Timing()
        answer = ""
        try:
            with self._open() as response:
                timing.held_s = float(response.headers.get(COLD_START_HEADER) or 0.0)
                for event in _events(response):
                    timing.count_tokens(event.get("usage"))
                    for piece in _pieces(event):
                        timing.mark_piece()
                        answer += piece
                        write(piece)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return str(timing)

    def _open(self) -> http.client.HTTPResponse:
        body: dict[str, Any] = {
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.model is not None:
            body["model"] = self.model
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
            return response
        except urllib.error.HTTPError as error:
            hint = ""
            if error.code == http.HTTPStatus.UNAUTHORIZED:
                hint = f" (--api-key or {running_models.KEY_VARIABLE} has the key)"
            raise CommandError(f"{error.code}: {_message_of(error.read())}{hint}") from error
        except OSError as error:
            raise CommandError(f"{self.url}: {getattr(error, 'reason', error)}") from error


class _Timing:
    def __init__(self) -> None:
        self.held_s = 0.0
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = self._started_s
        self._n_tokens = 0

    def mark_piece(self) -> None:
        """Note that a piece of text has arrived now."""
        self._last_s = time.monotonic()
        self._first_s = self._first_s or self._last_s

    def count_tokens(self, usage: Mapping[str, Any] | None) -> None:
        """Take the number of tokens from the usage that a stream ends with."""
        self._n_tokens = (usage or {}).get("completion_tokens", self._n_tokens)

    def __str__(self) -> str:
        text = f"waited {self.held_s:.2f} s for functions, " if self.held_s else ""
        if self._first_s is None:
            return f"{text}no text within {time.monotonic() - self._started_s:.2f} s"
        text += f"first token {self._first_s - self._started_s:.2f} s"
        if self._n_tokens > 1 and self._last_s > self._first_s:
            text += f", then {(self._n_tokens - 1) / (self._last_s - self._first_s):.1f} tokens/s"
        return text


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a streamed chat.

    Raises:
        CommandError: an error event came, or the connection was lost before the end.
    """
    for line in _lines(response):
        data = line.decode("utf-8", "replace").strip().removeprefix("data:").strip()
        if not line.startswith(b"data:"):
            continue
        if data == "[DONE]":
            return
        if not line.endswith(b"\n"):
            break  # cut within an event
        event = json.loads(data)
        if "error" in event:
            raise CommandError(str(event["error"]["message"]))
        yield event
    raise CommandError("the stream ended before its last event")


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        yield from response
    except (OSError, http.client.HTTPException) as error:
        raise CommandError(f"the stream broke: {error}") from error


def _pieces(event: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a chunk, reasoning included."""
    for choice in event["choices"]:
        delta = choice["delta"]
        if text := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
            yield text


def _message_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500]


def add_commands(commands: Any) -> None:
    """Add `faasmoe chat`."""
    parser = commands.add_parser(
        "chat",
        help="chat with a running model",
        description="Chat with a running model in the terminal. Each answer is followed by what\n"
        f"it waited for. {FORGET} begins a new conversation, Ctrl-D ends.",
        epilog="Examples:\n"
        "  faasmoe chat\n"
        '  faasmoe chat qwen-moe --message "Why is the sky blue?"\n'
        "  faasmoe chat qwen-moe -n models --tenant research   # a MoEModel of the cluster\n"
        f"  {running_models.KEY_VARIABLE}=s3cret faasmoe chat --url http://127.0.0.1:8000/v1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    running_models.add_model(parser)
    parser.add_argument("--url", help="base URL of any OpenAI-compatible API, with /v1")
    running_models.add_api_key(parser)
    parser.add_argument("--tenant", default="", help="tenant, of a MoEModel of a cluster")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--message", metavar="TEXT", help="send this message and end")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="default: %(default)s"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the input ends."""
    with _endpoint(arguments) as (url, model):
        session = ChatSession(
            url,
            model,
            running_models.api_key_of(arguments),
            arguments.max_tokens,
            _opening(arguments.system),
        )
        if arguments.message is not None:
            _answer(session, arguments.message)
        elif not sys.stdin.isatty():
            _answer(session, sys.stdin.read().strip())
        else:
            converse(session, sys.stdin, system=arguments.system)
    return 0


def converse(session: ChatSession, source: TextIO, *, system: str | None) -> None:
    """Answer lines until they end; an error is printed, and the conversation goes on."""
    print(PROMPT, end="", flush=True)
    for line in source:
        text = line.strip()
        if text == FORGET:
            session.messages = _opening(system)
        elif text:
            try:
                _answer(session, text)
            except CommandError as error:
                print(f"error: {error}", file=sys.stderr)
        print(PROMPT, end="", flush=True)
    print()


def _answer(session: ChatSession, text: str) -> None:
    if not text:
        raise CommandError("expected a message, got nothing", exit_status=2)
    taken = session.ask(text, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    print(f"[{taken}]", file=sys.stderr, flush=True)


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


@contextmanager
def _endpoint(arguments: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Yield the base URL of an API and the model's name in requests."""
    if arguments.url is not None:
        yield arguments.url.rstrip("/"), arguments.model
        return
    cluster = running_models.cluster_of(arguments)
    if cluster is not None:
        with kubectl_plugin.forwarded_api(cluster, arguments.model, arguments.tenant) as endpoint:
            yield endpoint
        return
    if arguments.tenant:
        raise CommandError(
            f"--tenant: got {arguments.tenant!r} for a model of this machine, where the API key "
            "tells the tenant; expected -n, --context or --kubeconfig with it",
            exit_status=2,
        )
    instance = running_models.select_instance(arguments.model, arguments.file)
    yield f"{instance.url}/v1", instance.served_name or instance.name
