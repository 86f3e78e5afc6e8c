"""The whole system on the device: one file, `faasmoe up`, the same answers wherever parts are."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from launched import Up, launched
from tiny_chat import EXPERTS, MAX_MODEL_LEN, save_tiny_chat_model

PLACES = {"host": ("cpu", "cpu"), "router": ("cuda", "cpu"), "both": ("cuda", "cuda")}
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"prompt": "the quick brown", "max_tokens": 24, "temperature": 0},
    {"prompt": "a lazy dog", "max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"prompt": "jumps over", "max_tokens": 6, "logprobs": 3, "presence_penalty": 1.5, "seed": 1},
    {"prompt": ["fox", "dog the"], "max_tokens": 9, "temperature": 0, "logit_bias": {"9": -100}},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny") / "model")


def moemodel(model: Path, *, router: str, experts: str) -> str:
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


def answers_of(up: Up) -> list[dict[str, Any]]:
    """Return all choices of all answers."""
    choices: list[dict[str, Any]] = []
    for question in QUESTIONS:
        url, body = f"{up.base_url}/v1/completions", {"model": "tiny", **question}
        answer = httpx.post(url, json=body, timeout=60.0, trust_env=False)
        assert answer.status_code == 200, answer.text
        choices += answer.json()["choices"]
    return choices


def logprobs_of(choice: dict[str, Any]) -> list[float]:
    return list((choice["logprobs"] or {}).get("token_logprobs", []))


def test_answers_are_the_same_wherever_router_and_functions_are(
    model: Path, tmp_path: Path
) -> None:
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, (router, experts) in PLACES.items():
        folder = tmp_path / name
        folder.mkdir()
        file = folder / "tiny.yaml"
        file.write_text(moemodel(model, router=router, experts=experts))
        with launched(file, folder / "up.log") as up:
            answers[name] = answers_of(up)
            n_here = up.router_metric("local_computations_total")
            assert up.router_metric("function_calls_total") > 10 * n_here
    for name in ("router", "both"):
        for got, expected in zip(answers[name], answers["host"], strict=True):
            assert got["text"] == expected["text"]
            assert logprobs_of(got) == pytest.approx(logprobs_of(expected), abs=1e-3)
