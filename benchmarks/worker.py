"""The inside of a worker process: commands as JSON lines on stdin, answers on what was stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from faasmoe_expert.lifeline import die_with_parent

Handle = Callable[[dict[str, Any]], dict[str, Any]]


def serve_commands(make: Callable[[], Handle]) -> None:
    """Make the handler, then answer commands until stdin ends.

    An error ends the process with its traceback: half a benchmark is none.

    Args:
        make: sets up what the worker measures and returns what answers a command.
    """
    die_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever a library prints must not look like an answer
        handle = make()
        _say(answers, {"pid": os.getpid()})
        for line in sys.stdin:
            _say(answers, handle(json.loads(line)))


def _say(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
