"""Loggers of servers are set up once in a process, and in those that are forked from it."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from faasmoe_gateway.server import prepare_logging


def uvicorn_streams() -> list[object]:
    return [getattr(h, "stream", None) for h in logging.getLogger("uvicorn").handlers]


def test_loggers_that_write_to_stderr_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", first)
    prepare_logging()
    handlers = list(logging.getLogger("uvicorn").handlers)
    assert uvicorn_streams() == [first]
    prepare_logging()
    assert logging.getLogger("uvicorn").handlers == handlers
    monkeypatch.setattr(sys, "stderr", second)
    prepare_logging()
    assert uvicorn_streams() == [second]
    assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.INFO)
