"""Conformance of every endpoint and parameter, with the unmodified openai client.

Each case is a row of docs/openai.md together with the test that verifies it, and the other test
modules that verify the row's details. To regenerate the document:

    python -m tests.router.api.test_conformance
"""

import json
import math
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from faasmoe_router.api import validation
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer

DOCUMENT = Path(__file__).parents[3] / "docs" / "openai.md"
MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown fox"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": None}}


@dataclass(frozen=True)
class ApiUnderTest:
    """Clients of a server without and of one with a chat template that supports tools."""

    client: openai.OpenAI
    tools: openai.OpenAI
    http: httpx.Client
    model_tokenizer: ModelTokenizer
    serve_template: Callable[[str], str]

    def chat(self, **parameters: Any) -> Any:
        """Request a chat completion, by default greedy and of 12 tokens."""
        return _chat(self.client, **parameters)

    def text(self, **parameters: Any) -> Any:
        """Request a text completion, by default greedy and of 12 tokens."""
        defaults = {"prompt": "the quick", "temperature": 0, "max_tokens": 12}
        return self.client.completions.create(
            model="tiny", **{**defaults, **_client_arguments(Completions.create, parameters)}
        )

    def with_template(self, chat_template: str, **parameters: Any) -> Any:
        """Request a chat completion of a server with this chat template."""
        url = self.serve_template(chat_template)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            response = _chat(client, **parameters)
            return list(response) if parameters.get("stream") else response

    def tokens(self, text: str) -> list[int]:
        """Return the token IDs of a text."""
        return self.model_tokenizer.encode(text, add_special_tokens=False)


def _client_arguments(method: Callable[..., Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a method's arguments; parameters that it does not know go into `extra_body`."""
    names = signature(method).parameters
    known = {name: value for name, value in parameters.items() if name in names}
    unknown = {name: value for name, value in parameters.items() if name not in names}
    return {**known, "extra_body": unknown}


def _chat(client: openai.OpenAI, **parameters: Any) -> Any:
    defaults = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(
        model="tiny", **{**defaults, **_client_arguments(ChatCompletions.create, parameters)}
    )


def _message_content(response: Any) -> str:
    return str(response.choices[0].message.content)


@dataclass(frozen=True)
class ConformanceCase:
    """A row of the document and the check that verifies it."""

    section: str
    name: str
    description: str
    check: Callable[[ApiUnderTest], None]
    details: tuple[str, ...] = ()


CASES: list[ConformanceCase] = []


def conformance_case(
    section: str, name: str, description: str, *, details: Sequence[str] = ()
) -> Callable[[Callable[[ApiUnderTest], None]], None]:
    """Register the decorated check as a case with this description in the document.

    `details` names the test modules, below tests/, that verify what the check leaves out.
    """

    def add(check: Callable[[ApiUnderTest], None]) -> None:
        CASES.append(ConformanceCase(section, name, description, check, tuple(details)))

    return add


@pytest.fixture(scope="module")
def peer(
    server: tuple[str, Engine],
    tool_server: str,
    model_tokenizer: ModelTokenizer,
    serve_template: Callable[[str], str],
) -> Iterator[ApiUnderTest]:
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 20}
    with (
        openai.OpenAI(base_url=f"{server[0]}/v1", **options) as client,
        openai.OpenAI(base_url=f"{tool_server}/v1", **options) as tools,
        httpx.Client(base_url=server[0], timeout=120) as http,
    ):
        yield ApiUnderTest(client, tools, http, model_tokenizer, serve_template)


ENDPOINTS, BOTH = "Endpoints", "Parameters of both completion endpoints"
CHAT, TEXT = "Parameters of chat completions", "Parameters of completions"
RESPONSE_FIELDS = "Response fields"


@conformance_case(
    ENDPOINTS, "POST /v1/chat/completions", "one response, or a stream of server-sent events"
)
def _chat_endpoint(peer: ApiUnderTest) -> None:
    full = peer.chat()
    chunks = list(peer.chat(stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == _message_content(full)
    assert chunks[-1].choices[0].finish_reason == full.choices[0].finish_reason == "length"


@conformance_case(
    ENDPOINTS, "POST /v1/completions", "the same for one or several prompts, as text or token IDs"
)
def _completion_endpoint(peer: ApiUnderTest) -> None:
    full = peer.text(prompt=["a", "b"])
    texts = ["", ""]
    for chunk in peer.text(prompt=["a", "b"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in full.choices]


@conformance_case(ENDPOINTS, "GET /v1/models, /v1/models/{id}", "the model, with `max_model_len`")
def _models(peer: ApiUnderTest) -> None:
    [model] = peer.client.models.list().data
    assert peer.client.models.retrieve("tiny") == model
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError):
        peer.client.models.retrieve("other")


@conformance_case(
    ENDPOINTS, "POST /v1/embeddings", "not supported: 501 with an error object, no client retries"
)
def _embeddings(peer: ApiUnderTest) -> None:
    with pytest.raises(openai.InternalServerError) as rejected:
        peer.client.with_options(max_retries=2).embeddings.create(model="tiny", input="a")
    assert rejected.value.status_code == 501
    assert rejected.value.code == "not_implemented"
    assert rejected.value.response.headers["x-should-retry"] == "false"


@conformance_case(
    ENDPOINTS,
    "POST /v1/responses",
    "stateless: input items, instructions, function and custom tools, structured output, "
    "reasoning, log-probabilities, streaming, vLLM's sampling parameters and constraints; "
    "`store: true`, `previous_response_id`, OpenAI's own tools are refused",
    details=["router/api/test_responses_endpoint.py", "router/api/test_reasoning_with_grammar.py"],
)
def _responses(peer: ApiUnderTest) -> None:
    text = peer.client.responses.create(model="tiny", input="a", temperature=0).output_text
    assert text == _message_content(
        peer.chat(messages=[{"role": "user", "content": "a"}], max_tokens=None)
    )
    web_search: Any = [{"type": "web_search"}]
    for refused in ({"store": True}, {"previous_response_id": "resp_1"}, {"tools": web_search}):
        with pytest.raises(openai.BadRequestError) as rejected:
            peer.client.responses.create(model="tiny", input="a", **refused)
        assert str(rejected.value.param).startswith(next(iter(refused)))


@conformance_case(
    ENDPOINTS,
    "POST /v1/messages, /v1/messages/count_tokens",
    "Anthropic's: system, text, thinking and tool blocks, tools, structured output, streaming, "
    "cached tokens; vLLM's sampling parameters and constraints; keys also as `x-api-key`",
    details=[
        "router/api/test_messages_endpoint.py",
        "router/api/test_http.py",
        "router/tenants/test_translated_apis.py",
    ],
)
def _anthropic(peer: ApiUnderTest) -> None:
    body = {"max_tokens": 3, "messages": MESSAGES}
    answer = peer.http.post("/v1/messages", json=body).json()
    counted = peer.http.post("/v1/messages/count_tokens", json={"messages": MESSAGES}).json()
    assert answer["usage"]["input_tokens"] == counted["input_tokens"]


@conformance_case(
    ENDPOINTS, "POST /tokenize, /v1/tokenize", "as in vLLM: a prompt, or messages with tools"
)
def _tokenize(peer: ApiUnderTest) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        body = peer.http.post(path, json={"prompt": "fox", "return_token_strs": True}).json()
        ids = peer.tokens("fox")
        assert body == {
            "count": len(ids),
            "max_model_len": 256,
            "tokens": ids,
            "token_strs": peer.model_tokenizer.token_strings(ids),
        }
        chat = {"messages": MESSAGES, "add_generation_prompt": True}
        assert peer.http.post(path, json=chat).json()["tokens"] == peer.model_tokenizer.encode_chat(
            MESSAGES
        )


@conformance_case(ENDPOINTS, "POST /detokenize, /v1/detokenize", "as in vLLM")
def _detokenize(peer: ApiUnderTest) -> None:
    body = {"tokens": [0, *peer.tokens("fox 日")]}
    long = {"tokens": peer.tokens("x") * 5000}
    assert peer.http.post("/detokenize", json=long).json() == {"prompt": "x" * 5000}
    for path in ("/detokenize", "/v1/detokenize"):
        assert peer.http.post(path, json=body).json() == {"prompt": "<|end|>fox 日"}


@conformance_case(
    ENDPOINTS,
    "GET /health, /load, /version, /metrics, /docs",
    "for probes, Prometheus and people; do not expose them. `/docs` loads a script from a CDN, and "
    "`/openapi.json`; both need a key where there are tenants",
)
def _probes(peer: ApiUnderTest) -> None:
    for path in ("/health", "/version", "/metrics", "/docs", "/openapi.json"):
        assert peer.http.get(path).status_code == 200
    assert peer.http.get("/load").json() == {"server_load": 0}
    with peer.chat(stream=True, max_tokens=200) as stream:
        next(iter(stream))
        assert peer.http.get("/load").json()["server_load"] == 1


@conformance_case(
    BOTH,
    "model",
    "the served name (`router.servedModelName`, slashes allowed), or left out; any other returns "
    "404, `model_not_found`",
    details=["router/api/test_http.py", "integration/test_up_access.py"],
)
def _model(peer: ApiUnderTest) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert peer.http.post("/v1/completions", json=body).json()["model"] == "tiny"
    with pytest.raises(openai.NotFoundError) as rejected:
        peer.client.completions.create(model="other", prompt="a")
    assert rejected.value.code == "model_not_found"


@conformance_case(
    BOTH,
    "max_tokens",
    "finish reason `length`; more than the context holds is rejected; by default 16 in completions "
    "and the rest of the context in chats",
)
def _max_tokens(peer: ApiUnderTest) -> None:
    five = peer.text(max_tokens=5)
    assert (five.usage.completion_tokens, five.choices[0].finish_reason) == (5, "length")
    assert peer.text(max_tokens=None).usage.completion_tokens == 16
    assert peer.chat(max_tokens=None).usage.total_tokens == 256
    with pytest.raises(openai.BadRequestError) as rejected:
        peer.text(max_tokens=10**6)
    assert rejected.value.code == "context_length_exceeded"


@conformance_case(
    BOTH,
    "temperature, top_p, top_k, min_p",
    "temperature 0 to 2, default 1; 0 is greedy; other defaults come from the checkpoint's "
    "`generation_config.json`, as in vLLM, unless `router.generationConfig` is `none`",
    details=["router/engine/test_sampling_defaults.py", "router/engine/test_sampler.py"],
)
def _sampling(peer: ApiUnderTest) -> None:
    greedy = _message_content(peer.chat())
    for narrow in ({"top_p": 0}, {"top_k": 1}, {"min_p": 1}):
        assert _message_content(peer.chat(temperature=2, seed=4, **narrow)) == greedy
    assert _message_content(peer.chat(temperature=2, seed=4)) != greedy
    drawn = [_message_content(peer.chat(temperature=t, seed=4)) for t in (None, 1)]
    assert drawn[0] == drawn[1]
    with pytest.raises(openai.BadRequestError) as rejected:
        peer.chat(temperature=2.1)
    assert rejected.value.param == "temperature"


@conformance_case(BOTH, "seed", "reproducible, alone and in a batch; each choice gets its own seed")
def _seed(peer: ApiUnderTest) -> None:
    def sample(**parameters: Any) -> list[str]:
        response = peer.chat(temperature=1.5, seed=11, **parameters)
        return [choice.message.content for choice in response.choices]

    single = sample()
    four = sample(n=4)
    assert sample() == single == four[:1]
    assert len(set(four)) == 4
    with peer.chat(stream=True, max_tokens=200, seed=1, temperature=1):
        assert sample() == single


@conformance_case(BOTH, "n", "up to 128 choices, limited by the server's capacity")
def _n(peer: ApiUnderTest) -> None:
    response = peer.text(n=3, temperature=1)
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert response.usage.completion_tokens == 36
    for n in (13, 129):  # the server has 4 running and 8 waiting places
        with pytest.raises(openai.BadRequestError) as rejected:
            peer.text(n=n)
        assert rejected.value.param == "n"


@conformance_case(BOTH, "stop", "up to 4 strings; the text excludes the one that ended it")
def _stop(peer: ApiUnderTest) -> None:
    text = peer.text(max_tokens=40).choices[0].text
    choice = peer.text(max_tokens=40, stop=["never", text[8:11]]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[8:11])], "stop")
    with pytest.raises(openai.BadRequestError) as rejected:
        peer.text(stop=list("abcde"))
    assert rejected.value.param == "stop"


@conformance_case(
    BOTH, "include_stop_str_in_output", "the text includes the stop string or the stop token"
)
def _include_stop(peer: ApiUnderTest) -> None:
    text = peer.text(max_tokens=40).choices[0].text
    stop = text[8:11]
    choice = peer.text(max_tokens=40, stop=stop, include_stop_str_in_output=True).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop) + 3], "stop")


@conformance_case(BOTH, "stop_token_ids", "tokens that end the text, like the model's EOS tokens")
def _stop_token_ids(peer: ApiUnderTest) -> None:
    letters = {"allowed_token_ids": peer.tokens("abcdefgh")}
    text = peer.text(**letters).choices[0].text
    [stop] = peer.tokens(text[3])
    choice = peer.text(stop_token_ids=[stop], **letters).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[3])], "stop")


@conformance_case(BOTH, "min_tokens", "EOS tokens and stop conditions do not apply before")
def _min_tokens(peer: ApiUnderTest) -> None:
    forced = {"structured_outputs": {"regex": "[ab]{1,30}"}, "logit_bias": {"0": 100}}
    assert peer.text(max_tokens=40, **forced).usage.completion_tokens == 2  # a letter, the end
    assert peer.text(max_tokens=40, min_tokens=9, **forced).usage.completion_tokens == 10


@conformance_case(BOTH, "ignore_eos", "continues after the model's EOS token")
def _ignore_eos(peer: ApiUnderTest) -> None:
    assert peer.text(ignore_eos=True).choices[0].finish_reason == "length"


@conformance_case(BOTH, "skip_special_tokens", "false includes special tokens in the text")
def _skip_special(peer: ApiUnderTest) -> None:
    only = {"allowed_token_ids": [1], "max_tokens": 2}
    assert peer.text(**only).choices[0].text == ""
    assert peer.text(skip_special_tokens=False, **only).choices[0].text == "<|im_start|>" * 2


@conformance_case(BOTH, "presence_penalty, frequency_penalty", "-2 to 2, for generated tokens")
def _penalties(peer: ApiUnderTest) -> None:
    [x, y] = peer.tokens("xy")
    two = {"allowed_token_ids": [x, y], "max_tokens": 6, "logit_bias": {str(x): 20, str(y): 19}}
    assert "y" in peer.text(**{**two, "frequency_penalty": 2}).choices[0].text
    likely = {**two, "logit_bias": {str(x): 60, str(y): 0}}
    assert peer.text(**likely, presence_penalty=2).choices[0].text == "x" * 6
    assert peer.text(**likely, presence_penalty=-2).choices[0].text == "x" * 6
    plain = peer.text(max_tokens=60).choices[0].text
    assert peer.text(max_tokens=60, presence_penalty=2).choices[0].text != plain


@conformance_case(
    BOTH, "repetition_penalty", "above 0, at most 10, for prompt and generated tokens"
)
def _repetition(peer: ApiUnderTest) -> None:
    plain = peer.text(max_tokens=60).choices[0].text
    assert peer.text(max_tokens=60, repetition_penalty=1.0).choices[0].text == plain
    assert peer.text(max_tokens=60, repetition_penalty=3.0).choices[0].text != plain


@conformance_case(BOTH, "logit_bias", "up to 1024 tokens, -100 to 100, applied before penalties")
def _logit_bias(peer: ApiUnderTest) -> None:
    [x] = peer.tokens("x")
    assert peer.text(logit_bias={str(x): 100}).choices[0].text == "x" * 12
    assert "x" not in peer.text(logit_bias={str(x): -100}, max_tokens=60).choices[0].text
    assert peer.text(logit_bias={str(x): 20}).choices[0].text == "x" * 12
    penalised = peer.text(logit_bias={str(x): 20}, repetition_penalty=10).choices[0].text
    assert penalised.count("x") < 12  # (score + 20) / 10, not score / 10 + 20
    for bias in ({str(x): 101}, dict.fromkeys(map(str, range(1025)), 0)):
        with pytest.raises(openai.BadRequestError) as rejected:
            peer.text(logit_bias=bias)
        assert rejected.value.param == "logit_bias"


@conformance_case(
    BOTH, "allowed_token_ids, bad_words", "the only tokens allowed; words that are forbidden"
)
def _allowed(peer: ApiUnderTest) -> None:
    [x, y] = peer.tokens("xy")
    text = peer.text(allowed_token_ids=[x, y]).choices[0].text
    assert set(text) <= {"x", "y"}
    banned = peer.text(allowed_token_ids=[x, y], bad_words=["xx", "yy"]).choices[0].text
    assert banned in ("xy" * 6, "yx" * 6)


@conformance_case(
    BOTH, "response_format", "`text`, `json_object`, `json_schema`, enforced for every token"
)
def _response_format(peer: ApiUnderTest) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    choice = peer.chat(response_format=schema, max_tokens=150).choices[0]
    assert choice.finish_reason == "stop"
    person = json.loads(choice.message.content)
    assert person["name"] in ("Ada", "Bob")
    assert isinstance(person["age"], int)
    text = _message_content(peer.chat(response_format={"type": "json_object"}, max_tokens=60))
    assert text.startswith("{")
    plain = _message_content(peer.chat())
    assert _message_content(peer.chat(response_format={"type": "text"})) == plain


@conformance_case(
    BOTH, "structured_outputs", "vLLM's `json`, `json_object`, `regex`, `choice`, `grammar`"
)
def _structured(peer: ApiUnderTest) -> None:
    def generate(**constraint: Any) -> str:
        choice = peer.chat(structured_outputs=constraint, max_tokens=150).choices[0]
        assert choice.finish_reason == "stop"
        return str(choice.message.content)

    assert json.loads(generate(json=PERSON)).keys() == {"name", "age"}
    assert re.fullmatch("[a-c]{3}[0-9]{2}", generate(regex="[a-c]{3}[0-9]{2}"))
    assert generate(choice=["yes", "no"]) in ("yes", "no")
    assert generate(grammar='root ::= "<" [a-z] [a-z] ">"')[::3] == "<>"


@conformance_case(
    BOTH, "guided_json, guided_regex, guided_choice, guided_grammar", "vLLM's older names"
)
def _guided(peer: ApiUnderTest) -> None:
    assert peer.text(guided_choice=["left"]).choices[0].text == "left"
    assert re.fullmatch("[0-9]{4}", peer.text(guided_regex="[0-9]{4}").choices[0].text)
    assert peer.text(guided_grammar='root ::= "a" "b"').choices[0].text == "ab"
    assert peer.text(guided_json={"const": 5}).choices[0].text == "5"


@conformance_case(
    BOTH, "regex, ebnf, grammar, json_schema", "names of SGLang and llama.cpp for the same"
)
def _peers(peer: ApiUnderTest) -> None:
    assert re.fullmatch("[0-9]{4}", peer.text(regex="[0-9]{4}").choices[0].text)
    for name in ("ebnf", "grammar"):
        assert peer.text(**{name: 'root ::= "a" "b"'}).choices[0].text == "ab"
    assert peer.text(json_schema={"const": 5}).choices[0].text == "5"


@conformance_case(
    BOTH,
    "prompt_logprobs, logprob_token_ids, return_token_ids, return_tokens_as_token_ids",
    "as in vLLM; `rank` is null beyond the candidates; log-probabilities of prompts are computed "
    "one token per step, and in streams only with `echo`",
    details=["router/api/test_prompt_logprobs.py"],
)
def _token_details(peer: ApiUnderTest) -> None:
    parameters = {"prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 3}
    choice = peer.text(**parameters).choices[0]
    assert len(choice.prompt_logprobs) == len(choice.prompt_token_ids)
    assert len(choice.token_ids) == 3
    named = peer.text(logprobs=0, return_tokens_as_token_ids=True).choices[0].logprobs
    assert all(token.startswith("token_id:") for token in named.tokens)
    ranks = [e["rank"] for entry in choice.prompt_logprobs[1:] for e in entry.values()]
    assert None in ranks
    assert set(ranks) <= {1, None}
    asked = {"logprobs": 2, "logprob_token_ids": [5, 9], "allowed_token_ids": [7]}
    tops = peer.text(**asked, return_tokens_as_token_ids=True).choices[0].logprobs.top_logprobs
    assert all(top.keys() == {"token_id:5", "token_id:7", "token_id:9"} for top in tops)
    with pytest.raises(openai.BadRequestError) as rejected:
        peer.text(stream=True, prompt_logprobs=1)
    assert rejected.value.param == "prompt_logprobs"


@conformance_case(
    BOTH,
    "priority, cache_salt, truncate_prompt_tokens, truncation_side, request_id",
    "as in vLLM; `priority` is among the waiting requests of the same tenant, and `cache_salt` "
    "keeps cached prefixes from other requests of the same tenant, which never shares with others",
    details=["router/engine/test_fair_queue.py", "transformers_adapter/test_prefix_cache.py"],
)
def _priority(peer: ApiUnderTest) -> None:
    response = peer.text(priority=3, cache_salt="s", truncate_prompt_tokens=1, request_id="mine")
    assert (response.id, response.usage.prompt_tokens) == ("cmpl-mine", 1)
    for side, kept in ((None, [6, 7]), ("left", [6, 7]), ("right", [4, 5])):
        cut = {"truncate_prompt_tokens": 2, "truncation_side": side, "return_token_ids": True}
        assert peer.text(prompt=[4, 5, 6, 7], **cut).choices[0].prompt_token_ids == kept


@conformance_case(
    BOTH,
    "add_special_tokens",
    "whether the tokenizer's own, such as BOS, are added: by default to prompts, not to chats, "
    "whose template writes them",
    details=["router/engine/test_tokenizer.py"],
)
def _add_special_tokens(peer: ApiUnderTest) -> None:
    for value in (True, False):  # the tiny tokenizer adds none
        assert peer.text(add_special_tokens=value).choices[0].text == peer.text().choices[0].text
        chat = peer.chat(add_special_tokens=value)
        assert _message_content(chat) == _message_content(peer.chat())


@conformance_case(BOTH, "stream_options", "`include_usage`, and vLLM's `continuous_usage_stats`")
def _stream_options(peer: ApiUnderTest) -> None:
    *chunks, last = peer.chat(stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert all(chunk.usage is None for chunk in chunks)
    both = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in peer.text(stream=True, stream_options=both)]
    assert counts == sorted(counts)
    assert counts[-1] == 12


@conformance_case(
    BOTH,
    "user, metadata, store, safety_identifier, prompt_cache_key, service_tier",
    "accepted without effect, like unknown fields; `service_tier` must be `auto` or `default` and "
    "is echoed as `default`",
)
def _accepted(peer: ApiUnderTest) -> None:
    response = peer.chat(
        user="me",
        metadata={"a": "b"},
        store=True,
        safety_identifier="x",
        prompt_cache_key="y",
        service_tier="auto",
        some_future_parameter={"x": 1},
    )
    assert _message_content(response) == _message_content(peer.chat())
    assert response.service_tier == "default"
    assert peer.chat().service_tier is None
    with pytest.raises(openai.BadRequestError) as rejected:
        peer.chat(service_tier="flex")
    assert rejected.value.param == "service_tier"


@conformance_case(BOTH, "X-Request-Id", "echoed, or generated if missing or invalid")
def _request_id(peer: ApiUnderTest) -> None:
    response = peer.client.with_raw_response.models.list(extra_headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    for invalid in ({}, {"X-Request-Id": "no spaces allowed"}):
        response = peer.client.with_raw_response.models.list(extra_headers=invalid)
        assert len(response.headers["x-request-id"]) >= 16


@conformance_case(
    CHAT,
    "messages",
    "system, developer (system if the template has no such role), user, assistant with "
    "`tool_calls`, tool, and any other that the template renders; text and refusal parts; other "
    "fields, such as `reasoning_content`, are passed to the template; arguments of earlier calls "
    "that are no JSON object are passed as `{}`",
    details=["router/api/test_chat_messages.py"],
)
def _messages(peer: ApiUnderTest) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u", "name": "me"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]
    response = _chat(peer.tools, messages=messages)
    assert response.choices[0].message.role == "assistant"


@conformance_case(CHAT, "max_completion_tokens", "as `max_tokens`, which it overrides")
def _max_completion_tokens(peer: ApiUnderTest) -> None:
    assert peer.chat(max_completion_tokens=3, max_tokens=9).usage.completion_tokens == 3


@conformance_case(CHAT, "logprobs, top_logprobs", "up to 20, of the unmodified distribution")
def _chat_logprobs(peer: ApiUnderTest) -> None:
    parameters = {"logprobs": True, "top_logprobs": 3, "temperature": 1.5, "seed": 2}
    choice = peer.chat(**parameters).choices[0]
    content = choice.logprobs.content
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode(errors="replace") == choice.message.content
    assert [len(entry.top_logprobs) for entry in content] == [3] * len(content)
    assert all(entry.logprob <= entry.top_logprobs[0].logprob <= 0 for entry in content)
    assert sum(math.exp(top.logprob) for top in content[0].top_logprobs) <= 1
    chunks = [chunk.choices[0] for chunk in peer.chat(stream=True, **parameters)]
    streamed = [e for chunk in chunks if chunk.logprobs for e in chunk.logprobs.content]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in content]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in content], abs=1e-3)


def _calls(client: openai.OpenAI, **parameters: Any) -> tuple[list[tuple[str, Any]], str]:
    """Return the tool calls and finish reason, after checking that a stream has the same."""
    parameters = {"tools": [WEATHER, CLOCK], "max_tokens": 300, **parameters}
    choice = _chat(client, **parameters).choices[0]
    tool_calls = choice.message.tool_calls or []
    assert all(call.type == "function" and call.id.startswith("call_") for call in tool_calls)
    calls = [(call.function.name, call.function.arguments) for call in tool_calls]
    streamed: list[list[str]] = []
    finish_reason = None
    for chunk in _chat(client, stream=True, **parameters):
        for delta in chunk.choices[0].delta.tool_calls or []:
            if delta.index == len(streamed):
                assert delta.id.startswith("call_")
                streamed.append([delta.function.name, ""])
            streamed[delta.index][1] += delta.function.arguments
        finish_reason = chunk.choices[0].finish_reason
    assert [tuple(call) for call in streamed] == calls
    assert finish_reason == choice.finish_reason
    return [(name, json.loads(arguments)) for name, arguments in calls], choice.finish_reason


def _forced_tool_calls(*calls: str) -> dict[str, Any]:
    text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    return {"structured_outputs": {"choice": [text]}}


@conformance_case(
    CHAT,
    "tools, tool_choice auto",
    "calls are parsed in the form of the chat template: Hermes and Qwen, Qwen3-Coder, GLM, "
    "DeepSeek V3 and V3.1, Kimi K2, MiniMax, GPT-OSS, Mistral (both), Llama 3 and 4 (JSON and "
    "Python); a template without tools gets them as a system message; custom tools without a "
    "grammar; finish reason `tool_calls`",
    details=[
        "router/toolcalls/test_parser.py",
        "router/toolcalls/test_blocks.py",
        "router/toolcalls/test_pythonic.py",
        "router/toolcalls/test_reasoning.py",
        "router/api/test_reasoning.py",
        "router/api/test_tools.py",
    ],
)
def _tools_auto(peer: ApiUnderTest) -> None:
    first = '{"name": "weather", "arguments": {"city": "Rome"}}'
    second = '{"name": "clock", "arguments": {}}'
    calls, reason = _calls(peer.tools, **_forced_tool_calls(first, second))
    assert calls == [("weather", {"city": "Rome"}), ("clock", {})]
    assert reason == "tool_calls"
    plain = _chat(peer.tools, tools=[CLOCK]).choices[0]
    assert (plain.message.tool_calls, plain.finish_reason) == (None, "length")


@conformance_case(CHAT, "tool_choice none", "the prompt does not mention the tools")
def _tools_none(peer: ApiUnderTest) -> None:
    response = _chat(peer.tools, tools=[WEATHER], tool_choice="none")
    assert _message_content(response) == _message_content(_chat(peer.tools))


@conformance_case(CHAT, "tool_choice required", "enforced; arguments conform to the tools' schemas")
def _tools_required(peer: ApiUnderTest) -> None:
    calls, reason = _calls(peer.tools, tool_choice="required", parallel_tool_calls=False)
    [(name, arguments)] = calls
    assert name in ("weather", "clock")
    if name == "weather":
        assert arguments["city"] in ("Rome", "Oslo")
    assert reason == "tool_calls"


@conformance_case(
    CHAT, "tool_choice of a function", "enforces one call of it; finish reason `stop`, as OpenAI's"
)
def _tools_named(peer: ApiUnderTest) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    [(name, arguments)], reason = _calls(peer.tools, tool_choice=choice)
    assert (name, reason) == ("weather", "stop")
    assert arguments in ({"city": "Rome"}, {"city": "Oslo"})


@conformance_case(CHAT, "tool_choice allowed_tools", "`auto` or `required` among some of the tools")
def _tools_allowed(peer: ApiUnderTest) -> None:
    weather = {"type": "function", "function": {"name": "weather"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [weather]}}
    [(name, _)], _ = _calls(peer.tools, tool_choice=choice, parallel_tool_calls=False)
    assert name == "weather"


@conformance_case(CHAT, "parallel_tool_calls", "false allows only one call")
def _parallel(peer: ApiUnderTest) -> None:
    call = '{"name": "clock", "arguments": {}}'
    calls, _ = _calls(peer.tools, parallel_tool_calls=False, **_forced_tool_calls(call, call))
    assert calls == [("clock", {})]


@conformance_case(CHAT, "tools with response_format", "either calls or JSON of the schema")
def _tools_or_json(peer: ApiUnderTest) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": {"a": 1}}}}
    response = _chat(peer.tools, tools=[WEATHER], response_format=schema, max_tokens=300)
    message = response.choices[0].message
    assert message.tool_calls or json.loads(message.content) == {"a": 1}


@conformance_case(
    CHAT,
    "include_reasoning",
    "reasoning (`<think>`, `[THINK]`, channels of GPT-OSS, told by the chat template) is "
    "`reasoning` and `reasoning_content` of messages and deltas unless false; a grammar begins "
    "after the reasoning, or at once where its marks are not single tokens and for GPT-OSS",
    details=["router/api/test_reasoning.py", "router/api/test_reasoning_with_grammar.py"],
)
def _include_reasoning(peer: ApiUnderTest) -> None:
    opened = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# </think> #}"
    message = peer.with_template(opened).choices[0].message
    assert message.content is None
    assert message.reasoning == message.reasoning_content != ""
    deltas = [c.choices[0].delta for c in peer.with_template(opened, stream=True) if c.choices]
    streamed = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert streamed.strip() == message.reasoning.strip()
    hidden = peer.with_template(opened, include_reasoning=False).choices[0].message
    assert (hidden.content, "reasoning" in (hidden.model_extra or {})) == (None, False)


@conformance_case(
    CHAT,
    "reasoning_effort",
    "as the model's chat template knows it, else `X-FaaSMoE-Warning` says that it has no effect; "
    "`none` also where the template can turn reasoning off, else it is refused",
)
def _reasoning_effort(peer: ApiUnderTest) -> None:
    assert _message_content(peer.chat(reasoning_effort="none")) == _message_content(peer.chat())
    effort = _chat(peer.tools, reasoning_effort="low")
    assert effort.usage.prompt_tokens > _chat(peer.tools).usage.prompt_tokens
    raw = peer.client.chat.completions.with_raw_response
    answered = raw.create(model="tiny", messages=MESSAGES, max_tokens=2, reasoning_effort="low")
    assert "reasoning_effort has no effect" in answered.headers["X-FaaSMoE-Warning"]


@conformance_case(CHAT, "chat_template_kwargs", "variables of the chat template")
def _template_kwargs(peer: ApiUnderTest) -> None:
    gloomy = _chat(peer.tools, chat_template_kwargs={"mood": "gloomy"})
    assert gloomy.usage.prompt_tokens > _chat(peer.tools).usage.prompt_tokens


@conformance_case(
    CHAT,
    "add_generation_prompt, continue_final_message",
    "`false` and `true` continue the last message",
)
def _continue(peer: ApiUnderTest) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "jumps"}]
    parameters = {"add_generation_prompt": False, "continue_final_message": True}
    response = peer.chat(messages=messages, **parameters)
    ids = peer.model_tokenizer.encode_chat(MESSAGES) + peer.tokens("jumps")
    assert response.usage.prompt_tokens == len(ids)
    assert _message_content(response) == peer.text(prompt=ids).choices[0].text


@conformance_case(CHAT, "echo", "a last message of the assistant precedes the content, as in vLLM")
def _chat_echo(peer: ApiUnderTest) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "jumps"}]
    going_on = {"add_generation_prompt": False, "continue_final_message": True}
    plain = _message_content(peer.chat(messages=messages, **going_on))
    echoed = peer.chat(messages=messages, echo=True, **going_on)
    assert _message_content(echoed) == "jumps" + plain
    chunks = peer.chat(messages=messages, echo=True, stream=True, **going_on)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == "jumps" + plain
    assert _message_content(peer.chat(echo=True)) == _message_content(peer.chat())


@conformance_case(TEXT, "prompt", "a string, a list of token IDs, or a list of either")
def _prompt(peer: ApiUnderTest) -> None:
    ids = peer.tokens("fox")
    texts = {peer.text(prompt=prompt).choices[0].text for prompt in ("fox", ["fox"], ids, [ids])}
    assert len(texts) == 1


@conformance_case(
    TEXT,
    "logprobs",
    "up to 20, in OpenAI's legacy form; with `echo` also of the prompt, as lm-eval reads them",
    details=["router/api/test_prompt_logprobs.py"],
)
def _text_logprobs(peer: ApiUnderTest) -> None:
    parameters = {"logprobs": 2, "allowed_token_ids": peer.tokens("abcdefgh")}
    choice = peer.text(**parameters).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == list(range(12))
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob <= max(top.values()) < 0
        assert 2 <= len(top) <= 3  # includes the sampled token even if it is unlikely
    deltas = [chunk.choices[0].logprobs for chunk in peer.text(stream=True, **parameters)]
    assert [token for delta in deltas if delta for token in delta.tokens] == logprobs.tokens
    assert [at for delta in deltas if delta for at in delta.text_offset] == logprobs.text_offset


@conformance_case(TEXT, "echo", "the prompt precedes the text; `max_tokens` may be 0")
def _echo(peer: ApiUnderTest) -> None:
    assert peer.text(prompt="a 日", echo=True, max_tokens=0).choices[0].text == "a 日"
    text = peer.text(prompt=["a 日", "b"], n=2).choices
    echoed = peer.text(prompt=["a 日", "b"], n=2, echo=True).choices
    assert [choice.text for choice in echoed] == [
        prompt + choice.text for prompt, choice in zip(["a 日"] * 2 + ["b"] * 2, text, strict=True)
    ]
    streamed = "".join(c.choices[0].text for c in peer.text(prompt="fox", echo=True, stream=True))
    assert streamed == "fox" + peer.text(prompt="fox").choices[0].text


@conformance_case(TEXT, "best_of", "must equal `n`")
def _best_of(peer: ApiUnderTest) -> None:
    assert len(peer.text(n=2, best_of=2).choices) == 2
    with pytest.raises(openai.BadRequestError) as rejected:
        peer.text(n=2, best_of=3)
    assert rejected.value.param == "best_of"


@conformance_case(
    RESPONSE_FIELDS, "system_fingerprint", "identifies the weights, their format and the hardware"
)
def _fingerprint(peer: ApiUnderTest) -> None:
    fingerprints = {chunk.system_fingerprint for chunk in peer.chat(stream=True)}
    assert {peer.chat().system_fingerprint, peer.text().system_fingerprint} == fingerprints
    assert re.fullmatch("fp_[0-9a-f]{12}", fingerprints.pop())


@conformance_case(
    RESPONSE_FIELDS,
    "usage.prompt_tokens_details",
    "`cached_tokens`: from the tenant's own earlier prompts only, see [tenants](tenants.md); "
    "`cache_write_tokens`: what its later prompts find; null in a stream until known",
    details=["transformers_adapter/test_prefix_cache.py", "router/tenants/test_translated_apis.py"],
)
def _prompt_details(peer: ApiUnderTest) -> None:
    both = {"include_usage": True, "continuous_usage_stats": True}
    usage = peer.chat(n=2).usage
    details = usage.prompt_tokens_details  # nothing is shared without tenants
    assert (details.cached_tokens, details.cache_write_tokens) == (0, 0)
    first, *_, last = peer.chat(stream=True, stream_options=both)
    assert first.usage.prompt_tokens_details is None
    assert last.usage.prompt_tokens_details == usage.prompt_tokens_details


@conformance_case(
    RESPONSE_FIELDS,
    "usage.completion_tokens_details",
    "`reasoning_tokens`; the rest is 0: there is no speculative prediction",
    details=["router/api/test_reasoning.py"],
)
def _completion_details(peer: ApiUnderTest) -> None:
    for response in (peer.chat(), peer.text()):
        details = response.usage.completion_tokens_details
        assert (details.reasoning_tokens, details.audio_tokens) == (0, 0)
        assert details.accepted_prediction_tokens == details.rejected_prediction_tokens == 0


@conformance_case(
    RESPONSE_FIELDS,
    "choices[].stop_reason",
    "as in vLLM: the stop string, or the token of `stop_token_ids`, that ended the text; else null",
)
def _stop_reason(peer: ApiUnderTest) -> None:
    letters = {"allowed_token_ids": peer.tokens("abcdefgh")}
    plain = peer.text(**letters).choices[0]
    assert plain.stop_reason is None
    [token] = peer.tokens(plain.text[3])
    for stop, parameter in ((plain.text[3], "stop"), (token, "stop_token_ids")):
        parameters = {parameter: [stop], **letters}
        assert peer.text(**parameters).choices[0].stop_reason == stop
        assert [*peer.text(stream=True, **parameters)][-1].choices[0].stop_reason == stop
        chat = {parameter: [stop], "allowed_token_ids": [token]}
        assert peer.chat(**chat).choices[0].stop_reason == stop
        assert [*peer.chat(stream=True, **chat)][-1].choices[0].stop_reason == stop
    ended = peer.text(allowed_token_ids=[0, 1]).choices[0]
    assert ended.stop_reason is None


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.section}-{c.name}".replace(" ", "-")) for c in CASES]
)
def test_server_conforms_to_documentation(case: ConformanceCase, peer: ApiUnderTest) -> None:
    case.check(peer)


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **dict.fromkeys(validation.UNSUPPORTED_CHAT_PARAMS, "something"),
    },
    "/v1/completions": {**dict.fromkeys(validation.UNSUPPORTED_COMPLETION_PARAMS, "something")},
}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, id=f"{path}-{name}")
        for path in UNSUPPORTED
        for name in UNSUPPORTED[path]
    ],
)
def test_unsupported_parameter_is_rejected_by_name(
    path: str, name: str, peer: ApiUnderTest
) -> None:
    if (path, name) in {("/v1/chat/completions", "best_of"), ("/v1/completions", "best_of")}:
        value: Any = 7
    else:
        value = UNSUPPORTED[path][name]
    body = {"model": "tiny", "messages": MESSAGES, "prompt": "a", "max_tokens": 1, name: value}
    error = peer.http.post(path, json=body).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]


HEAD = """\
# The OpenAI-compatible surface

The supported endpoints, parameters and response fields. This document is generated by
`tests/router/api/test_conformance.py`, which tests every row with the unmodified `openai` client,
or with plain HTTP where the client has no method, and names the test modules of a row's details.

- Unknown fields are ignored, as clients expect. A known field that is not supported is rejected by
  name: 400, `unsupported_parameter`, with `param`.
- Every error is an OpenAI error object: `{"error": {"message", "type", "param", "code"}}`. In a
  stream it is the last event, `data: {"error": ...}`, without `[DONE]` after it.
- A body may have what fits into the context: 256 KiB plus twice the bytes of text, or 8 bytes per
  token ID; at most 8 MiB; 262,144 values, 32,768 objects and lists, nested 128 deep. 413 beyond. At
  most 2048 messages, 2048 text parts each, and 128 `tool_calls` per message.
- The finish reason of a stream comes with the last text or call of its choice, as in vLLM.
- A stream without an event for 15 s, such as one that waits in a queue, sends a comment line.
- When a client disconnects, its request is cancelled.
- Every GET endpoint answers HEAD. Bodies may be compressed (`Content-Encoding: gzip`, `deflate` or
  `zstd` with windows up to 8 MiB); others, and `zstd` at the gateway of several models, are refused
  with 415. Pages of the origins in `router.corsOrigins`, or `faasmoe up --cors-origin`, may call
  the API; a preflight needs no key.
- `faasmoe up --api-key` requires a key; for limits per key, use [tenants](tenants.md).
- Log-probabilities are those of the unmodified distribution (log-softmax of the model's scores), as
  in OpenAI and vLLM: before temperature, biases, penalties and grammars.
- Scores are processed in this order: `logit_bias`, forbidden and allowed tokens; penalties;
  grammars; temperature, `min_p`, `top_k`, `top_p`.
- Structured output is enforced by llguidance. JSON schemas with `not`, `if`, `contains`,
  `uniqueItems` or other keywords that it does not support are rejected by name, unless
  `json_schema.strict` is false. Schemas of tools without `strict: true` are enforced as far as
  possible; the header `X-FaaSMoE-Warning` says what is not. A grammar may have at most 64 KiB. One
  that takes too much time fails only its own request. Whitespace in JSON is at most 16 characters
  long.
- A request fails with 400 if its constraints leave no allowed token.
"""


CLIENTS = """
## Clients

`make test-clients` runs these libraries, unmodified, against `faasmoe up`, in an environment of its
own (`tests/clients`; it needs npm). `FAASMOE_CLIENTS_ENGINE=vllm` and `FAASMOE_VLLM_PYTHON` run
them on vLLM's engine. In the last runs, on 30 November 2026, all 52 tests passed on both engines,
`transformers` (01:33) and `vllm` (01:17).

| client | version | uses, on both engines |
|---|---|---|
"""
CLIENT_USES = {
    "openai": ("openai (Python)", "chat, streams, `parse`, tools; responses, streams, `parse`"),
    "js openai": ("openai (JavaScript)", "chat, streams; responses, streams"),
    "langchain-openai": (
        "LangChain (`langchain-openai`)",
        "chat and responses: invoke, stream, structured output, tools",
    ),
    "langchain-anthropic": ("LangChain (`langchain-anthropic`)", "invoke, stream"),
    "litellm": ("litellm", "chat, streams, responses, Anthropic's messages"),
    "pydantic-ai-slim[anthropic,openai]": (
        "pydantic-ai",
        "chat, responses and Anthropic models: text and typed output",
    ),
    "instructor": ("instructor", "tools, JSON schema"),
    "js ai": (
        "Vercel's AI SDK (`ai`)",
        "responses (default), chat, OpenAI-compatible, Anthropic: text, streams, objects, tools",
    ),
    "llm": ("llm", "the command, streamed or not"),
    "anthropic": ("anthropic", "messages, streams, tools, `count_tokens`"),
    "lm_eval[api]": (
        "lm-eval (`local-completions`)",
        "generation; loglikelihood; a multiple-choice task",
    ),
}


def client_versions() -> dict[str, str]:
    """Return the pinned versions of the clients."""
    folder = Path(__file__).parents[2] / "clients"
    pins = re.findall(r"^([^#\s=]+)==(\S+)$", (folder / "requirements.txt").read_text(), re.M)
    packages = json.loads((folder / "js" / "package.json").read_text())["dependencies"]
    return {**dict(pins), **{f"js {name}": version for name, version in packages.items()}}


LM_EVAL = """
## lm-eval

Log-probabilities are those of the model: through the API, lm-eval gives the log-likelihoods of its
in-process model (within 1e-4 in float32), and the same accuracies. `make test-clients` compares
them document by document on the multiple-choice task of `tests/clients/lm_eval`, by these commands:

```sh
pip install torch==2.13.0 "lm_eval[api]" accelerate transformers
faasmoe up -f model.yaml
lm_eval run --model local-completions --tasks arc_easy --log_samples --output_path api \\
  --model_args model=NAME,base_url=http://127.0.0.1:8000/v1/completions,tokenizer=CHECKPOINT
lm_eval run --model hf --tasks arc_easy --log_samples --output_path hf \\
  --model_args pretrained=CHECKPOINT,dtype=float32
```
"""


VLLM = """
## vLLM's tests

`make test-vllm SDIST=FOLDER` runs the HTTP-level tests of an unpacked source distribution of vLLM
(0.33.0 was used) against the demo model. vLLM itself is not installed: its server's fixture starts
`faasmoe up`. `tests/clients/vllm_exclusions.py` lists each test that does not apply, with why.

On the engine `vllm` (`ARGS=--engine=vllm`), in one run of all files on 30 November 2026, 102 of
106 passed: all but `test_tokenize_chat_with_tools`, `test_logprobs`, `test_streaming` and
`test_function_tool_use` below.

On the engine `transformers`, in one run of all files on 30 November 2026, 102 of 106 passed: all
but `test_batch_completions`, `test_long_seed`, `test_empty_prompt` and
`test_enable_response_messages` below.
"""


def _vllm_exclusions() -> Any:
    path = Path(__file__).parents[2] / "clients" / "vllm_exclusions.py"
    return runpy.run_path(str(path))


def _vllm_lines() -> Iterator[str]:
    """Yield what of vLLM's tests is left out or fails, each kind once with its reason."""
    exclusions = _vllm_exclusions()
    for title, name in (("Not run", "NOT_RUN"), ("Not applicable", "NOT_APPLICABLE")):
        reasons = sorted({reason.partition(":")[0] for _, reason in exclusions[name]})
        yield f"- {title}: {'; '.join(reasons)}."
    fails = [f"`{p.strip('*')}` ({reason})" for p, reason in exclusions["NOT_SUPPORTED"]]
    yield f"- Known to fail: {', '.join(fails)}."


def document() -> str:
    """Return the content of docs/openai.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield HEAD
    for section in (ENDPOINTS, BOTH, CHAT, TEXT, RESPONSE_FIELDS):
        yield from (f"## {section}", "", f"| {_header(section)} | |", "|---|---|")
        for case in CASES:
            if case.section == section:
                names = case.name if section == ENDPOINTS else _code(case.name)
                yield f"| {names} | {case.description} |"
        yield ""
    yield "## Unsupported parameters"
    yield ""
    for path, params in UNSUPPORTED.items():
        yield f"- `{path}`: {', '.join(f'`{name}`' for name in sorted(params))}"
    yield CLIENTS.rstrip()
    versions = client_versions()
    yield from (
        f"| {name} | {versions[pin]} | {uses} |" for pin, (name, uses) in CLIENT_USES.items()
    )
    yield LM_EVAL.rstrip()
    yield VLLM
    yield from _vllm_lines()


def _header(section: str) -> str:
    return {ENDPOINTS: "endpoint", RESPONSE_FIELDS: "field"}.get(section, "parameter")


def _code(name: str) -> str:
    return ", ".join(f"`{part}`" for part in name.split(", "))


@pytest.mark.parametrize("module", sorted({module for case in CASES for module in case.details}))
def test_modules_that_test_details_exist(module: str) -> None:
    assert "def test_" in (Path(__file__).parents[2] / module).read_text()


def test_documentation_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document()


if __name__ == "__main__":
    DOCUMENT.write_text(document())
