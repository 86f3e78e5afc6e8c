"""`faasmoe up` as its users run it: one file, the openai client, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from faasmoe_up import FaasmoeUp, all_gone, running_up, start_up, wait_until
from openai import OpenAI

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
def reference_texts() -> dict[str, str]:
    """What the dense model answers greedily."""
    dense, tokenizer = load_dense(gguf_path())
    texts = {}
    for question in PROMPTS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = dense.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)  # [1, T]
        response = ids[0, inputs["input_ids"].shape[1] :]  # [N]
        texts[question] = tokenizer.decode(response, skip_special_tokens=True)
    return texts


@pytest.mark.parametrize("question", PROMPTS)
def test_the_exact_model_answers_what_the_dense_model_answers(
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


def test_a_stream_is_the_same_text_in_pieces(
    client: OpenAI, reference_texts: dict[str, str]
) -> None:
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


def test_models_are_listed_and_an_unknown_one_is_refused(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["exact"]
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "?"}])


def test_a_prompt_longer_than_the_context_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="exact", prompt="word " * 600, max_tokens=1)
    assert refusal.value.code == "context_length_exceeded"


def test_all_experts_were_computed_by_functions(up: FaasmoeUp, client: OpenAI) -> None:
    client.completions.create(model="exact", prompt="Once upon a time", max_tokens=4)
    # At least one call for each of 30 layers and 4 tokens.
    assert up.router_metric("function_calls_total") >= 4 * 30
    assert up.router_metric("local_computations_total") == 0


def test_the_router_calls_sandboxes_over_unix_sockets(up: FaasmoeUp, client: OpenAI) -> None:
    client.completions.create(model="exact", prompt="One two", max_tokens=2)
    accepted = 0
    for sandbox in up.sandboxes:
        sockets = [c.laddr for c in sandbox.net_connections("unix") if c.laddr.endswith(".sock")]
        assert sockets, "a sandbox listens on TCP alone"
        accepted += len(sockets) - 1  # one of them listens
    assert accepted > 0


def test_the_router_tries_whether_hot_functions_take_less_time_in_it(
    up: FaasmoeUp, client: OpenAI, reference_texts: dict[str, str]
) -> None:
    """Its duels do, whichever side wins them; the text is the same."""

    def some_were_computed() -> bool:
        response = client.chat.completions.create(
            model="exact",
            messages=[{"role": "user", "content": PROMPTS[0]}],
            max_tokens=N_TOKENS,
            temperature=0,
        )
        assert response.choices[0].message.content == reference_texts[PROMPTS[0]]
        return up.router_metric("colocated_computations_total") > 0

    wait_until(some_were_computed, timeout_s=60, what="a hot function computed in the router")
    assert up.router_metric("local_computations_total") == 0


def test_nothing_is_left_behind_by_a_killed_launcher(file: Path, up: FaasmoeUp) -> None:
    assert up.process.poll() is None  # the store is prepared, and another port is free
    killed = start_up(file, file.with_name("killed.log"))
    processes = killed.process_tree
    assert len(processes) >= 5  # launcher, zygote, three sandboxes or more, router
    killed.process.kill()
    killed.process.wait()
    wait_until(lambda: all_gone(processes), timeout_s=20, what="no process left")
