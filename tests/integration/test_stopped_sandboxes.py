"""All sandboxes hang: the router computes what it can itself, soon and however often it happens."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from core_waits import Stopwatch
from faasmoe_up import FaasmoeUp, running_up, wait_until
from moemodel_files import write_moemodel
from tiny_chat import save_tiny_chat_model

COMPLETION: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the quick brown fox",
    "max_tokens": 40,
    "temperature": 0,
}
N_PREPARING = 6  # requests after which the router knows how long calls take
LIMIT_S = (
    9.0  # thrice 2 s: in the mailbox, over HTTP, for a prompt and a token; a call may take 10 s
)


def write_model(folder: Path) -> Path:
    model = save_tiny_chat_model(folder / "model")
    spec = {
        "model": {"source": f"file://{model}"},
        "store": {"path": str(folder / "store")},
        "granularity": {"expertsPerFunction": 1, "layersPerFunction": 1},
        "router": {"device": "cpu"},
        "experts": {"device": "cpu", "functionsPerSandbox": 4, "placement": "functions"},
    }
    return write_moemodel(folder / "model.yaml", spec)


def complete(up: FaasmoeUp) -> tuple[str, float]:
    """Return a text and the seconds that it took, but for the router's waits for a core."""
    assert up.router is not None
    stopwatch = Stopwatch(up.router.pid)
    response = httpx.post(f"{up.base_url}/v1/completions", json=COMPLETION, timeout=60)
    response.raise_for_status()
    return response.json()["choices"][0]["text"], stopwatch.elapsed_s()


def have_returned(up: FaasmoeUp) -> bool:
    """Return whether all sandboxes are called again, which takes requests to notice."""
    complete(up)
    return up.router_metric("ejected_addresses") == 0


@pytest.mark.parametrize("mailbox", ["on", "off"])
def test_router_computes_for_stopped_sandboxes(tmp_path: Path, mailbox: str) -> None:
    file, variables = write_model(tmp_path), {"FAASMOE_MAILBOX": mailbox}
    with running_up(file, tmp_path / "up.log", variables=variables) as up:
        expected = [complete(up)[0] for _ in range(N_PREPARING)][-1]
        for _ in range(3):  # so that the budget of retries does not last
            sandboxes = up.sandboxes
            for sandbox in sandboxes:
                sandbox.send_signal(signal.SIGSTOP)
            try:
                text, elapsed_s = complete(up)
            finally:
                for sandbox in sandboxes:
                    sandbox.send_signal(signal.SIGCONT)
            print(f"mailbox {mailbox}, {len(sandboxes)} sandboxes stopped: {elapsed_s:.2f} s")
            assert text == expected
            assert elapsed_s < LIMIT_S
            wait_until(lambda: have_returned(up), timeout_s=120, what="all sandboxes")
