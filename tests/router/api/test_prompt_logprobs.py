"""Log-probabilities of prompts, as lm-eval reads them, against the in-process model."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import torch

from faasmoe_router.engine.tokenizer import ModelTokenizer

Greedy = Callable[[tuple[int, ...], int], list[int]]
TEXT: dict[str, Any] = {"model": "tiny", "temperature": 0}
PROMPT = "the quick brown fox 日 jumps"


@pytest.fixture
def expected(base_model: Any, model_tokenizer: ModelTokenizer) -> Callable[[str], list[float]]:
    """The log-probabilities of a prompt's tokens but the first, computed with transformers."""

    def logprobs(prompt: str) -> list[float]:
        ids = torch.tensor([model_tokenizer.encode(prompt)])  # [1, T]
        with torch.no_grad():
            scores = base_model(ids).logits[0, :-1].float().log_softmax(-1)  # [T - 1, V]
        return list(scores.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist())

    return logprobs


def test_echoed_prompt_has_the_model_s_logprobs(
    client: openai.OpenAI, model_tokenizer: ModelTokenizer, expected: Callable[[str], list[float]]
) -> None:
    ids = model_tokenizer.encode(PROMPT)
    answer = client.completions.create(**TEXT, prompt=ids, max_tokens=1, logprobs=1, echo=True)
    [choice] = answer.choices
    plain = client.completions.create(**TEXT, prompt=ids, max_tokens=1, logprobs=1)
    logprobs: Any = choice.logprobs
    assert choice.text == PROMPT + plain.choices[0].text
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(ids) + 1
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:-1] == pytest.approx(expected(PROMPT), abs=1e-3)
    assert plain.choices[0].logprobs is not None
    assert logprobs.token_logprobs[-1] == pytest.approx(
        plain.choices[0].logprobs.token_logprobs[0],
        abs=1e-3,
    )
    for token, logprob, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[token] == logprob <= max(top.values())
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset[-1] == len(PROMPT)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 1)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_stream_echoes_the_prompt_with_the_same_logprobs(
    client: openai.OpenAI, max_tokens: int
) -> None:
    body: Any = {**TEXT, "prompt": [PROMPT, "a"], "max_tokens": max_tokens}
    body |= {"logprobs": 2, "echo": True, "n": 2, "temperature": 1, "seed": 3}
    whole = client.completions.create(**body).choices
    texts, entries = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**body, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            logprobs: Any = choice.logprobs
            columns = (logprobs.tokens, logprobs.text_offset, logprobs.token_logprobs)
            entries[choice.index] += zip(*columns, strict=True)
    assert texts == [choice.text for choice in whole]
    for streamed, choice in zip(entries, whole, strict=True):
        logprobs = choice.logprobs
        assert [entry[:2] for entry in streamed] == [
            *zip(logprobs.tokens, logprobs.text_offset, strict=True)
        ]
        assert [entry[2] for entry in streamed[1:]] == pytest.approx(
            logprobs.token_logprobs[1:], abs=1e-3
        )
        assert streamed[0][2] is None


@pytest.mark.parametrize("prompt", [PROMPT, [5]])
def test_max_tokens_0_scores_only_the_prompt(
    client: openai.OpenAI, model_tokenizer: ModelTokenizer, prompt: Any
) -> None:
    answer = client.completions.create(
        **TEXT, prompt=prompt, max_tokens=0, logprobs=0, echo=True, n=2
    )
    text = prompt if isinstance(prompt, str) else model_tokenizer.decode(prompt)
    n_tokens = len(model_tokenizer.encode(text))
    for choice in answer.choices:
        assert (choice.text, choice.finish_reason) == (text, "length")
        logprobs: Any = choice.logprobs
        assert len(logprobs.token_logprobs) == n_tokens
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_max_tokens_0_without_logprobs_echoes(client: openai.OpenAI) -> None:
    answer = client.completions.create(**TEXT, prompt=["a", "b"], max_tokens=0, echo=True)
    assert [choice.text for choice in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(**TEXT, prompt="a", max_tokens=0)


def test_stop_tokens_within_the_prompt_do_not_end_it(
    client: openai.OpenAI, model_tokenizer: ModelTokenizer
) -> None:
    ids = model_tokenizer.encode("a fox")
    [stop] = model_tokenizer.encode("f")
    prompt = [ids[0], stop, stop, *ids]
    answer = client.completions.create(
        **TEXT,
        prompt=prompt,
        max_tokens=3,
        logprobs=0,
        echo=True,
        stop="f",
        extra_body={"stop_token_ids": [stop], "allowed_token_ids": [stop]},
    )
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    logprobs: Any = choice.logprobs
    assert len(logprobs.token_logprobs) == len(prompt)


def test_generation_after_a_scored_prompt_is_unchanged(client: openai.OpenAI) -> None:
    drawn = {"temperature": 1.3, "seed": 7, "frequency_penalty": 1.0, "presence_penalty": 0.5}
    body: Any = {**TEXT, "prompt": PROMPT, "max_tokens": 12, **drawn}
    extra = {"repetition_penalty": 1.2, "structured_outputs": {"regex": "[a-d]{4,20}x"}}
    plain = client.completions.create(**body, extra_body=extra).choices[0]
    scored = client.completions.create(**body, extra_body={**extra, "prompt_logprobs": 1})
    assert scored.choices[0].text == plain.text
    assert scored.choices[0].finish_reason == plain.finish_reason


def test_prompt_logprobs_have_vllm_s_form(
    http: httpx.Client, model_tokenizer: ModelTokenizer, expected: Callable[[str], list[float]]
) -> None:
    body = {**TEXT, "prompt": PROMPT, "max_tokens": 2, "prompt_logprobs": 2}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    ids = model_tokenizer.encode(PROMPT)
    own = [entry[str(token)] for entry, token in zip(rest, ids[1:], strict=True)]
    assert [entry["logprob"] for entry in own] == pytest.approx(expected(PROMPT), abs=1e-3)
    assert all(2 <= len(entry) <= 3 for entry in rest)
    assert choice["logprobs"] is None
    chat = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"request_id": "a b"}, "request_id"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/completions", json={**TEXT, "prompt": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_token_ids_are_returned(
    http: httpx.Client, model_tokenizer: ModelTokenizer, greedy: Greedy
) -> None:
    ids = model_tokenizer.encode("the fox")
    body = {**TEXT, "prompt": "the fox", "max_tokens": 5, "return_token_ids": True}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == greedy(tuple(ids), 5)
    stream = http.post("/v1/completions", json={**body, "stream": True}).text
    events = [line[6:] for line in stream.splitlines() if "{" in line]
    choices = [httpx.Response(200, text=event).json()["choices"][0] for event in events]
    assert choices[0]["prompt_token_ids"] == ids
    assert [token for part in choices for token in part["token_ids"]] == choice["token_ids"]


def test_what_is_not_requested_of_tokens_is_null(http: httpx.Client) -> None:
    [text] = http.post("/v1/completions", json={**TEXT, "prompt": "a"}).json()["choices"]
    assert text["prompt_logprobs"] is text["prompt_token_ids"] is text["token_ids"] is None
    chat = {**TEXT, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert answer["prompt_logprobs"] is answer["prompt_token_ids"] is None
    assert answer["choices"][0]["token_ids"] is None


def test_tokens_are_named_by_their_ids(http: httpx.Client) -> None:
    body = {**TEXT, "prompt": "the fox", "max_tokens": 3, "logprobs": 1}
    fields = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    [choice] = http.post("/v1/completions", json={**body, **fields}).json()["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "ends",
    [{"logit_bias": {"0": 100}, "stop_token_ids": [0]}, {"stop": ["bb"]}, {"max_tokens": 3}],
)
def test_tokens_and_their_logprobs_go_together(
    http: httpx.Client, model_tokenizer: ModelTokenizer, ends: dict[str, Any], is_stream: bool
) -> None:
    [b] = model_tokenizer.encode("b", add_special_tokens=False)
    body = {**TEXT, "prompt": "the fox", "max_tokens": 5, "logprobs": 1, "stream": is_stream}
    body |= {"logit_bias": {str(b): 100}, "return_tokens_as_token_ids": True, **ends}
    response = http.post("/v1/completions", json={**body, "return_token_ids": True})
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(event) for event in events] if is_stream else [response.json()]
    choices = [part["choices"][0] for part in parts]
    ids = [token for choice in choices for token in choice["token_ids"] or ()]
    tokens = [t for choice in choices for t in (choice["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == [f"token_id:{token}" for token in ids]
    assert ids == ([0] if "logit_bias" in ends else [b] * (2 if "stop" in ends else 3))


def test_prompt_is_truncated_from_the_left(
    client: openai.OpenAI, model_tokenizer: ModelTokenizer
) -> None:
    ids = model_tokenizer.encode(PROMPT)
    for n_kept, prompt in ((3, ids), (255, ids * 100)):
        limit = {"truncate_prompt_tokens": -1 if n_kept == 255 else n_kept}
        answer = client.completions.create(**TEXT, prompt=prompt, max_tokens=1, extra_body=limit)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == n_kept
        same = client.completions.create(**TEXT, prompt=prompt[-n_kept:], max_tokens=1)
        assert answer.choices[0].text == same.choices[0].text


def test_request_id_is_the_response_s(http: httpx.Client) -> None:
    body = {**TEXT, "prompt": "a", "max_tokens": 1, "request_id": "mine-1"}
    assert http.post("/v1/completions", json=body).json()["id"] == "cmpl-mine-1"
