"""Chats of pods, as Services are reachable only from within."""

from __future__ import annotations

import json
from pathlib import Path

from pod_runner import PodRunner

CHAT = Path(__file__).parents[1] / "real_node" / "chat_in_pod.py"
PROMPT = "the quick brown fox"


def pod_chat(programs: PodRunner, url: str, *, key: str = "none", model: str = "tiny") -> str:
    """Return the answer that a pod gets from a Service."""
    result = json.loads(programs.run("chat", CHAT, url, model, key, PROMPT))
    assert result["errors"] == []
    (text,) = result["texts"]
    return str(text)
