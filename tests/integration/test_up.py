"""`faasmoe up` with the exact demo model and the unmodified openai client."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from faasmoe_up import FaasmoeUp, all_gone, running_up, start_up, wait_until
from openai import OpenAI
from tiny_chat import save_tiny_chat_model
from tiny_system import moemodel_yaml

from faasmoe_router.checkpoint.demo import build, make_demo_model, moefication
from faasmoe_router.checkpoint.demo.build import gguf_path, load_dense

N_TOKENS = 40
PROMPTS = ("What is the capital of France?", "Give me three tips for sleeping well.")

MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: exact}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}"}}
  granularity: {{expertsPerFunction: 3, layersPerFunction: 1}}
  router: {{maxModelLen: 512, maxNumSeqs: 8}}
  experts: {{functionsPerSandbox: 30}}
"""


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Any]:
    """The dense model and its tokenizer; loaded once, which takes longer than splitting it."""
    loaded: tuple[Any, Any] = load_dense(gguf_path())
    return loaded


@pytest.fixture(scope="module")
def exact_demo_model(request: pytest.FixtureRequest, dense: tuple[Any, Any]) -> Path:
    """SmolLM2-135M split into experts that are all active, with the logits of the dense model.

    It is kept in pytest's cache. Short answers to two of the calibration's prompts, and clusters
    that are not refined, suffice: they only decide which neurons are together.
    """
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("demo-models") / "exact-of-two-prompts"
    model, tokenizer = dense
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moefication, "ANSWER_TOKENS", 2)
        patch.setattr(moefication, "CALIBRATION_PROMPTS", PROMPTS)
        patch.setattr(moefication, "_N_CLUSTER_ITERATIONS", 1)
        patch.setattr(build, "load_dense", lambda _: (model, copy.deepcopy(tokenizer)))
        return make_demo_model(folder, exact=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, exact_demo_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("up")
    path = folder / "exact.yaml"
    path.write_text(MOEMODEL.format(model=exact_demo_model, store=folder / "store"))
    return path


@pytest.fixture(scope="module")
def up(file: Path) -> Iterator[FaasmoeUp]:
    with running_up(file, file.with_name("up.log")) as running:
        yield running


@pytest.fixture
def client(up: FaasmoeUp) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{up.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def reference_texts(dense: tuple[Any, Any]) -> dict[str, str]:
    """Greedy texts of the dense model by question."""
    model, tokenizer = dense
    texts = {}
    for question in PROMPTS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)  # [1, T]
        response = ids[0, inputs["input_ids"].shape[1] :]  # [N]
        texts[question] = tokenizer.decode(response, skip_special_tokens=True)
    return texts


@pytest.mark.parametrize("question", PROMPTS)
def test_exact_model_generates_texts_of_dense_model(
    client: OpenAI, reference_texts: dict[str, str], question: str
) -> None:
    response = client.chat.completions.create(
        model="exact",
        messages=[{"role": "user", "content": question}],
        max_tokens=N_TOKENS,
        temperature=0,
    )
    assert len(reference_texts[question]) > 20
    assert response.choices[0].message.content == reference_texts[question]
    assert response.usage is not None
    assert response.usage.completion_tokens <= N_TOKENS


def test_stream_has_the_same_text(client: OpenAI, reference_texts: dict[str, str]) -> None:
    question = PROMPTS[0]
    chunks = list(
        client.chat.completions.create(
            model="exact",
            messages=[{"role": "user", "content": question}],
            max_tokens=N_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len([d for d in deltas if d]) > 5
    assert "".join(deltas) == reference_texts[question]
    assert chunks[-1].usage is not None


def test_lists_models_and_rejects_unknown_model(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["exact"]
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "?"}])


def test_rejects_prompt_longer_than_context(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="exact", prompt="word " * 600, max_tokens=1)
    assert raised.value.code == "context_length_exceeded"


def test_functions_compute_all_experts(up: FaasmoeUp, client: OpenAI) -> None:
    client.completions.create(model="exact", prompt="Once upon a time", max_tokens=4)
    # At least one call per layer (30) and token (4).
    assert up.router_metric("function_calls_total") >= 4 * 30
    assert up.router_metric("local_computations_total") == 0


def test_router_uses_unix_sockets(up: FaasmoeUp, client: OpenAI) -> None:
    client.completions.create(model="exact", prompt="One two", max_tokens=2)
    accepted = 0
    for sandbox in up.sandboxes:
        sockets = [c.laddr for c in sandbox.net_connections("unix") if c.laddr.endswith(".sock")]
        assert sockets, "a sandbox has no Unix socket"
        accepted += len(sockets) - 1  # one is the listener
    assert accepted > 0


def test_router_tries_to_run_hot_functions_in_process(
    up: FaasmoeUp, client: OpenAI, reference_texts: dict[str, str]
) -> None:
    """Trials run some calls in the router, whatever their outcome; texts are unchanged."""

    def has_colocated_computations() -> bool:
        response = client.chat.completions.create(
            model="exact",
            messages=[{"role": "user", "content": PROMPTS[0]}],
            max_tokens=N_TOKENS,
            temperature=0,
        )
        assert response.choices[0].message.content == reference_texts[PROMPTS[0]]
        return up.router_metric("colocated_computations_total") > 0

    wait_until(
        has_colocated_computations, timeout_s=120, what="a hot function computed in the router"
    )
    assert up.router_metric("local_computations_total") == 0


def test_children_exit_when_launcher_is_killed(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    file = tmp_path / "killed.yaml"
    file.write_text(moemodel_yaml(model, router="cpu", experts="cpu"))
    killed = start_up(file, file.with_suffix(".log"))
    processes = killed.process_tree
    assert len(processes) >= 6  # launcher, gateway, control, two zygotes, router
    killed.process.kill()
    killed.process.wait()
    wait_until(lambda: all_gone(processes), timeout_s=120, what="no process left")
