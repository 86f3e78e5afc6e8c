"""A grammar constrains the text after its reasoning, where the marks of reasoning are tokens."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import httpx
import pytest
from server_thread import running_server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from faasmoe_gateway.server import Server
from faasmoe_router.api.app import create_app
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry

END, START, CLOSE = 0, 1, 2
TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if mode == 'open' %}<think>\n{% elif mode == 'closed' %}<think>\n\n</think>\n\n{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "temperature": 1,
    "seed": 5,
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def url(base_model: Any) -> Iterator[str]:
    """A server of the tiny model with a tokenizer that has `<think>` and `</think>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_model.config.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<think>", "</think>"],
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(Tokenizer.__doc__)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE
    )
    registry = new_registry()
    engine = Engine(
        deepcopy(base_model),
        ModelTokenizer(tokenizer),
        limits=EngineLimits(max_model_len=1024, max_num_seqs=4, max_waiting=8),
        metrics=EngineMetrics(registry, "tiny"),
    )
    app = create_app(engine, model_name="tiny", registry=registry)
    with running_server(
        Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
    ) as server_url:
        yield server_url


def post(url: str, mode: str, bias: dict[int, float], **fields: Any) -> Any:
    body = {
        **CHAT,
        "chat_template_kwargs": {"mode": mode},
        "logit_bias": {str(token): value for token, value in bias.items()},
        **fields,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(url: str, mode: str, bias: dict[int, float], **fields: Any) -> dict[str, str]:
    body = {
        **CHAT,
        "chat_template_kwargs": {"mode": mode},
        "logit_bias": {str(token): value for token, value in bias.items()},
        "stream": True,
        **fields,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if "{" in line]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    return {
        name: "".join(delta.get(name) or "" for delta in deltas)
        for name in ("reasoning", "content")
    }


# The model is random: the biases make it close its reasoning after some tokens.
@pytest.mark.parametrize(
    ("mode", "bias"), [("open", {CLOSE: 5.0}), ("", {START: 95.0, CLOSE: 100.0})]
)
def test_json_follows_the_reasoning(url: str, mode: str, bias: dict[int, float]) -> None:
    bias = {END: -100.0, **bias}
    answer = post(url, mode, bias, response_format=FORMAT)
    [choice] = answer["choices"]
    message = choice["message"]
    n_reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert json.loads(message["content"]) == {"city": "Rome"}
    assert choice["finish_reason"] == "stop"
    assert 0 < n_reasoning < answer["usage"]["completion_tokens"]
    if mode == "open":
        assert message["reasoning"]
        assert streamed(url, mode, bias, response_format=FORMAT) == {
            "reasoning": message["reasoning"],
            "content": message["content"],
        }


@pytest.mark.parametrize("mode", ["", "closed"])
def test_text_without_reasoning_is_constrained_from_its_first_token(url: str, mode: str) -> None:
    bias = {START: -100.0} if mode == "" else {START: 100.0}
    answer = post(url, mode, bias, response_format=FORMAT)
    message = answer["choices"][0]["message"]
    assert json.loads(message["content"]) == {"city": "Rome"}
    assert "reasoning" not in message
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_enforced_calls_follow_the_reasoning(url: str) -> None:
    bias = {END: -100.0, CLOSE: 5.0}
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    [choice] = post(url, "open", bias, **fields)["choices"]
    [call] = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert choice["message"]["reasoning"]
    assert choice["finish_reason"] == "tool_calls"


def test_reasoning_that_never_ends_is_not_constrained(url: str) -> None:
    bias = {END: -100.0, CLOSE: -100.0}
    [choice] = post(url, "open", bias, response_format=FORMAT, max_tokens=20)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning"]
