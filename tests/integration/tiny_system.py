"""MoEModel file and requests for the whole system with a tiny model, on CPU or GPU."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from faasmoe_up import FaasmoeUp
from tiny_chat import EXPERTS, MAX_MODEL_LEN

REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "the quick brown", "max_tokens": 24, "temperature": 0},
    {"prompt": "a lazy dog", "max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"prompt": "jumps over", "max_tokens": 6, "logprobs": 3, "presence_penalty": 1.5, "seed": 1},
    {"prompt": ["fox", "dog the"], "max_tokens": 9, "temperature": 0, "logit_bias": {"9": -100}},
)


def moemodel_yaml(model: Path, *, router: str, experts: str) -> str:
    return f"""
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: tiny}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{model.parent / "store"}"}}
  granularity: {{expertsPerFunction: {EXPERTS // 2}, layersPerFunction: 1}}
  router: {{device: {router}, maxModelLen: {MAX_MODEL_LEN}, maxNumSeqs: 4}}
  experts: {{device: {experts}, functionsPerSandbox: 8}}
"""


def request_completions(up: FaasmoeUp) -> list[dict[str, Any]]:
    """Send REQUESTS; return all choices of all responses."""
    choices: list[dict[str, Any]] = []
    for request in REQUESTS:
        url, body = f"{up.base_url}/v1/completions", {"model": "tiny", **request}
        response = httpx.post(url, json=body, timeout=60.0, trust_env=False)
        assert response.status_code == 200, response.text
        choices += response.json()["choices"]
    return choices


def logprobs_of(choice: dict[str, Any]) -> list[float]:
    return list((choice["logprobs"] or {}).get("token_logprobs", []))


def assert_same_responses(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert equal texts, and log-probabilities within 1e-3.

    They need not be bit-identical: functions compute in another process or on another device, with
    other row counts, thread counts and instruction sets, so that sums are rounded differently.
    """
    assert [choice["text"] for choice in got] == [choice["text"] for choice in expected]
    assert [c["finish_reason"] for c in got] == [c["finish_reason"] for c in expected]
    for actual, reference in zip(got, expected, strict=True):
        assert logprobs_of(actual) == pytest.approx(logprobs_of(reference), abs=1e-3)
