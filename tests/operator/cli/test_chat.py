"""`faasmoe chat` against a server of the test's own."""

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from faasmoe_operator.cli import main
from faasmoe_operator.cli.chat import ChatSession, converse
from faasmoe_operator.errors import CommandError


@dataclass
class FakeServer:
    """Answers chats with these pieces, as a stream."""

    url: str = ""
    pieces: list[str] = field(default_factory=lambda: ["Hel", "lo"])
    n_tokens: int = 5
    error_status: int = 0
    stream_error: str = ""
    n_bytes_sent: int | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            fake.keys.append(self.headers.get("Authorization", ""))
            if fake.error_status:
                self._send(fake.error_status, json.dumps({"error": {"message": "No!"}}))
                return
            events: list[dict[str, Any]] = [
                {"choices": [{"delta": {"content": piece}}]} for piece in fake.pieces
            ]
            events.append({"choices": [], "usage": {"completion_tokens": fake.n_tokens}})
            lines = [": waiting", *(f"data: {json.dumps(e)}" for e in events)]
            if fake.stream_error:
                lines.append(f"data: {json.dumps({'error': {'message': fake.stream_error}})}")
            self._send(200, "\n\n".join([*lines, "data: [DONE]", ""]))

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("X-FaaSMoE-Cold-Start", "0.25")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode()[: fake.n_bytes_sent])

        def log_message(self, *_: object) -> None:
            return

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield fake
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def session(server: FakeServer) -> ChatSession:
    return ChatSession(server.url, "tiny", "s3cret", 64, [])


def test_an_answer_is_written_as_it_comes_and_remembered(server: FakeServer) -> None:
    chat = session(server)
    written: list[str] = []
    taken = chat.ask("Hi", written.append)
    assert written == ["Hel", "lo"]
    assert taken.startswith("waited 0.25 s for functions, first token ")
    assert taken.endswith(" tokens/s")
    chat.ask("Again", written.append)
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["Hi", "Hello", "Again"]
    assert server.bodies[0] | {"messages": []} == {
        "messages": [],
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
        "model": "tiny",
    }
    assert server.keys[0] == "Bearer s3cret"


def test_an_answer_without_text_is_said(server: FakeServer) -> None:
    server.pieces = []
    assert "no text within" in session(server).ask("Hi", print)


def test_a_refusal_is_said_and_the_message_forgotten(server: FakeServer) -> None:
    chat = session(server)
    server.error_status = 429
    with pytest.raises(CommandError, match="429: No!"):
        chat.ask("Hi", print)
    assert chat.messages == []
    server.error_status, server.stream_error = 0, "too late"
    with pytest.raises(CommandError, match="too late"):
        chat.ask("Hi", print)
    assert chat.messages == []


def test_a_stream_that_is_cut_is_an_error_and_the_conversation_goes_on(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.n_bytes_sent = 60
    chat = session(server)
    converse(chat, io.StringIO("Hi\n"), system=None)
    assert "error: the stream ended before its last event" in capsys.readouterr().err
    assert chat.messages == []


def test_a_connection_that_is_reset_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reset(io.BytesIO):
        headers: ClassVar[dict[str, str]] = {}

        def __next__(self) -> bytes:
            raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Reset())
    with pytest.raises(CommandError, match="the stream broke: reset by peer"):
        ChatSession("http://unused/v1", None, "", 1, []).ask("Hi", print)


def test_a_tenant_is_refused_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--tenant", "acme", "--message", "Hi"]) == 2
    assert "--tenant: got 'acme' for a model of this machine" in capsys.readouterr().err


def test_a_missing_key_is_explained(server: FakeServer) -> None:
    server.error_status = 401
    with pytest.raises(CommandError, match=r"401: No! \(--api-key or FAASMOE_API_KEY"):
        session(server).ask("Hi", print)


def test_a_conversation_goes_on_after_an_error(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.error_status = 500
    converse(session(server), io.StringIO("Hi\n"), system=None)
    assert "error: 500: No!" in capsys.readouterr().err
    server.error_status = 0
    converse(session(server), io.StringIO("Hi\n\n/new\nHo\n"), system="Be kind")
    assert [m["role"] for m in server.bodies[-1]["messages"]] == ["system", "user"]
    assert capsys.readouterr().out.count("Hello") == 2


def test_one_message_of_the_command_line(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--url", server.url, "--message", "Hi", "--system", "Be kind"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert "model" not in server.bodies[0]


def test_what_does_not_answer_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9/v1", "--message", "Hi"]) == 1
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().err
