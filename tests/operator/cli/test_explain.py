"""`faasmoe explain` reads the status and metrics of a running model, with a key where it must."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from faasmoe_operator.cli import main
from faasmoe_operator.cli.runtime_dir import LocalInstance, private_runtime_dir, register_instance

STATUS = {
    "functions": [{"ready": 1, "desired": 1, "size_bytes": 1}],
    "followers": 1,
    "held": 0,
    "failure": "",
}
METRICS = """\
vllm:e2e_request_latency_seconds_count 3
vllm:time_to_first_token_seconds_sum 0.6
vllm:time_to_first_token_seconds_count 3
vllm:request_decode_time_seconds_sum 2
"""


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A registered model, whose metrics want the key `s3cret`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_status = self.path == "/v1/status"
            body = (json.dumps(STATUS) if is_status else METRICS).encode()
            is_allowed = is_status or self.headers.get("Authorization") == "Bearer s3cret"
            is_busy = not is_status and self.headers.get("Authorization") == "Bearer busy"
            self.send_response(200 if is_allowed else 503 if is_busy else 401)
            self.send_header("Content-Type", "application/json" if is_status else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("FAASMOE_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with private_runtime_dir() as folder:
        metrics_url = f"{url}/metrics"
        register_instance(
            LocalInstance("tiny", "/tiny.yaml", os.getpid(), url, "t", url, "tiny", metrics_url),
            folder,
        )
        yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_without_the_key_the_times_are_unknown(
    instance: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain"]) == 0
    shown = capsys.readouterr().out
    assert "tiny: ready; 1 of 1 functions are active" in shown
    assert "/metrics wants a key: --api-key or FAASMOE_API_KEY" in shown


def test_a_router_that_does_not_answer_is_not_said_to_want_a_key(
    instance: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--api-key", "busy"]) == 0
    shown = capsys.readouterr().out
    assert "/metrics: got status 503, expected 200" in shown
    assert "wants a key" not in shown


@pytest.mark.parametrize("by_variable", [False, True])
def test_the_key_is_sent(
    instance: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    by_variable: bool,
) -> None:
    if by_variable:
        monkeypatch.setenv("FAASMOE_API_KEY", "s3cret")
    assert main(["explain", *([] if by_variable else ["--api-key", "s3cret"])]) == 0
    shown = capsys.readouterr().out
    assert "3 requests; first token 0.20 s" in shown
    assert "decode" in shown
