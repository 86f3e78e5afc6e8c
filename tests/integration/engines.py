"""The router's engines, as a parameter of suites that hold for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faasmoe_up import START_TIMEOUT_S
from tiny_chat import save_tiny_chat_model
from vllm_checkpoints import save_chat_checkpoint
from vllm_runs import NEEDS_VLLM, VLLM_PYTHON


@dataclass(frozen=True)
class RouterEngine:
    """An engine of the router.

    Attributes:
        name: value of `spec.router.engine`.
        router_fields: further fields of `spec.router`.
        variables: environment variables of `faasmoe up`.
        start_timeout_s: how long the start of `faasmoe up` may take.
        resumes_streams: whether another router goes on with a stream of one that was killed.
        handlers: spans of the API's own below that of a request.
        has_exemplars: whether histograms name traces.
    """

    name: str
    router_fields: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = START_TIMEOUT_S
    resumes_streams: bool = True
    handlers: frozenset[str] = frozenset({"template", "tokenize", "limit"})
    has_exemplars: bool = True

    def save_model(self, folder: Path, *, max_model_len: int = 256) -> Path:
        """Save a tiny chat model that the engine serves; return the folder."""
        if self.name == "vllm":
            return save_chat_checkpoint(folder, max_model_len=max_model_len)
        return save_tiny_chat_model(folder, max_model_len=max_model_len)

    def router_spec(self, **fields: Any) -> dict[str, Any]:
        """Return `spec.router` on the CPU, with further fields."""
        return {"engine": self.name, "device": "cpu", **self.router_fields, **fields}


OURS = RouterEngine("transformers")
VLLM = RouterEngine(
    "vllm",
    {"dtype": "float32", "kvCacheMemory": "64Mi"},
    {"FAASMOE_VLLM_PYTHON": VLLM_PYTHON},
    start_timeout_s=900.0,
    resumes_streams=False,
    handlers=frozenset(),
    has_exemplars=False,
)
ENGINES = (
    pytest.param(OURS, id="transformers"),
    pytest.param(VLLM, id="vllm", marks=[*NEEDS_VLLM, pytest.mark.timeout(1800)]),
)
