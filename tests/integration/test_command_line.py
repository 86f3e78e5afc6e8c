"""`faasmoe chat`, `explain` and `top` find a running `faasmoe up` and tell of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from faasmoe_up import FaasmoeUp, running_up
from tiny_chat import save_tiny_chat_model
from tiny_system import moemodel_yaml


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    folder = tmp_path_factory.mktemp("cli")
    model = save_tiny_chat_model(folder / "model")
    file = folder / "tiny.yaml"
    file.write_text(moemodel_yaml(model, router="cpu", experts="cpu"))
    with running_up(file, folder / "up.log") as up:
        yield up


def faasmoe(up: FaasmoeUp, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "faasmoe_operator.cli", *words],
        env={**os.environ, "XDG_RUNTIME_DIR": str(up.runtime)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_chat_is_explained(up: FaasmoeUp) -> None:
    before = faasmoe(up, "explain")
    assert "No request has been answered since the router started." in before.stdout, before.stderr
    first = faasmoe(up, "chat", "--message", "the quick brown fox", "--max-tokens", "8")
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert re.search(r"\[waited \d+\.\d\d s for functions, first token ", first.stderr)
    piped = faasmoe(up, "chat", "tiny", "--max-tokens", "8", stdin="the quick brown fox")
    assert piped.stdout.strip()
    explained = faasmoe(up, "explain", "tiny")
    print(explained.stdout)
    assert explained.returncode == 0, explained.stderr
    assert "tiny: ready; 4 of 4 functions are active" in explained.stdout
    assert re.search(r"^2 requests; first token \d+\.\d\d s", explained.stdout, re.MULTILINE)
    for step in ("activation", "queue", "prefill", "decode"):
        assert re.search(rf"^  {step} +\d+\.\d+ s +\d+ %$", explained.stdout, re.MULTILINE)


def test_top_shows_the_model(up: FaasmoeUp) -> None:
    shown = faasmoe(up, "top", "tiny", "--once")
    assert shown.stdout.startswith("tiny: 4 functions ("), shown.stderr
    unknown = faasmoe(up, "top", "other", "--once")
    assert unknown.returncode == 1
    assert "got other, expected one that runs: tiny" in unknown.stderr
