"""Tenants' endpoints over HTTP: authentication, and each tenant's model settings."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from faasmoe_router.engine.batcher import TOKENS_PER_PAGE
from faasmoe_router.engine.tokenizer import ModelTokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown fox"}]
Until = Callable[[Callable[[], bool]], None]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
PROMPT = "Always answer in verse."


@pytest.fixture(scope="module")
def router(open_router: Any) -> Iterator[Any]:
    tenants = {
        "acme": {
            "modelAlias": "acme-chat",
            "systemPrompt": PROMPT,
            "limits": {"maxModelLen": 100, "maxOutputTokens": 20},
        },
        "beta": {},
    }
    with open_router(tenants) as running:
        yield running


def test_a_tenant_is_served_at_its_own_path_and_at_the_root(router: Any) -> None:
    for path in ("", "/acme"):
        with router.client("acme", path=path) as client:
            answer = client.chat.completions.create(**CHAT)
            assert answer.choices[0].finish_reason == "length"
            assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices
            streamed = list(client.chat.completions.create(**CHAT, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
            assert text == answer.choices[0].message.content


@pytest.mark.parametrize("verb", ["GET", "POST"])
@pytest.mark.parametrize(
    ("path", "key"),
    [
        pytest.param("/v1/{}", None, id="no-key"),
        pytest.param("/v1/{}", "wrong", id="wrong-key"),
        pytest.param("/acme/v1/{}", None, id="no-key-at-a-tenant"),
        pytest.param("/acme/v1/{}", "wrong", id="wrong-key-at-a-tenant"),
        pytest.param("/acme/v1/{}", "beta-key", id="another-tenant-s-key"),
        pytest.param("/nobody/v1/{}", "acme-key", id="unknown-tenant"),
        pytest.param("/nobody/v1/{}", None, id="unknown-tenant-without-key"),
        pytest.param("/v1/v1/{}", "wrong", id="tenant-v1"),
        pytest.param("/nothing/{}", None, id="unknown-path"),
        pytest.param("/openapi.json?{}", None, id="schema"),
    ],
)
def test_every_unauthenticated_request_gets_the_same_response(
    router: Any, verb: str, path: str, key: str | None
) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = router.url + path.format("chat/completions")
    response = httpx.request(
        verb, url, headers=headers, json=CHAT if verb == "POST" else None, timeout=60
    )
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert len(response.headers["x-request-id"]) == 32
    assert response.json() == {
        "error": {
            "message": "Incorrect API key provided. Send one of your tenant's keys in the header "
            "'Authorization: Bearer KEY'.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }


def test_the_openai_client_raises_its_authentication_error(router: Any) -> None:
    with (
        router.client("acme", key="sk-wrong") as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "header", ["Basic YWNtZS1rZXk=", "acme-key", "Bearer", "bearer  wrong", "Bearer acme-key x"]
)
def test_other_authorization_headers_are_rejected(router: Any, header: str) -> None:
    response = httpx.get(f"{router.url}/v1/models", headers={"Authorization": header}, timeout=60)
    assert response.status_code == 401


def test_the_authorization_scheme_is_case_insensitive(router: Any) -> None:
    headers = {"Authorization": "bearer acme-key"}
    assert httpx.get(f"{router.url}/v1/models", headers=headers, timeout=60).status_code == 200


def test_bytes_that_are_not_utf_8_are_an_unknown_key(router: Any) -> None:
    headers = {b"Authorization": b"Bearer \xff\xfe\x80"}
    assert httpx.get(f"{router.url}/v1/models", headers=headers, timeout=60).status_code == 401


def test_a_tenant_sees_no_metrics_of_others(router: Any) -> None:
    assert router.get("/metrics").status_code == router.get("/metrics", key="x").status_code == 401
    router.complete("beta")
    text = router.get("/metrics", key="acme-key").text
    assert 'faasmoe_tenant_prompt_tokens_total{tenant="acme"}' in text
    assert "vllm:num_requests_running" in text
    assert "beta" not in text


@pytest.mark.parametrize("path", ["/health", "/ping", "/version"])
def test_health_needs_no_key_and_are_only_at_the_root(router: Any, path: str) -> None:
    assert router.get(path).status_code == 200
    assert router.get(f"/acme{path}").status_code == 401
    assert router.get(f"/v1{path}", key="acme-key").status_code == 404


def test_rejections_are_identical_and_compare_every_key(
    router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts comparisons rather than time: the cost of a rejection must not reveal its reason."""
    cases = {
        "missing": ("/v1/models", {}),
        "wrong": ("/v1/models", {"Authorization": "Bearer wrong-key"}),
        "other": ("/acme/v1/models", {"Authorization": "Bearer beta-key"}),
        "unknown": ("/nobody/v1/models", {"Authorization": "Bearer beta-key"}),
    }
    compare, n_comparisons = hmac.compare_digest, 0

    def counted(one: Any, other: Any) -> bool:
        nonlocal n_comparisons
        n_comparisons += 1
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    answers = []
    for path, headers in cases.values():
        n_comparisons = 0
        answer = httpx.get(f"{router.url}{path}", headers=headers, timeout=60)
        output = {n: v for n, v in answer.headers.items() if n not in ("date", "x-request-id")}
        answers.append((answer.status_code, answer.content, output, n_comparisons))
    assert answers == [answers[0]] * len(cases)
    assert answers[0][0] == 401
    assert answers[0][-1] == 2  # one key of each tenant


def test_the_model_is_served_under_its_alias(router: Any) -> None:
    with router.client("acme") as client:
        assert [model.id for model in client.models.list()] == ["tiny", "acme-chat"]
        assert client.models.retrieve("acme-chat").id == "acme-chat"
        answer = client.chat.completions.create(**{**CHAT, "model": "acme-chat"})
        assert answer.model == "acme-chat"
    with router.client("beta") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(**{**CHAT, "model": "acme-chat"})
        assert refused.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("acme-chat")


def test_models_report_the_tenant_s_model_length(router: Any) -> None:
    for name, length in (("acme", 100), ("beta", 256)):
        described = router.get("/v1/models/tiny", key=f"{name}-key").json()
        assert described["max_model_len"] == length


def test_the_system_prompt_is_prepended_to_conversations_without_one(
    router: Any,
    model_tokenizer: ModelTokenizer,
    greedy: Callable[[tuple[int, ...], int], list[int]],
) -> None:
    def expected(*messages: dict[str, str]) -> str:
        return model_tokenizer.decode(greedy(tuple(model_tokenizer.encode_chat(messages)), 6))

    default = {"role": "system", "content": PROMPT}
    own = {"role": "system", "content": "Be brief."}
    with router.client("acme") as acme, router.client("beta") as beta:
        answer = acme.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == expected(default, *MESSAGES)
        assert answer.usage.prompt_tokens == len(model_tokenizer.encode_chat([default, *MESSAGES]))
        answer = acme.chat.completions.create(**{**CHAT, "messages": [own, *MESSAGES]})
        assert answer.choices[0].message.content == expected(own, *MESSAGES)
        answer = beta.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == expected(*MESSAGES)


def test_a_chat_is_tokenised_with_the_system_prompt(
    router: Any, model_tokenizer: ModelTokenizer
) -> None:
    default = {"role": "system", "content": PROMPT}
    chat = {"prompt": None, "messages": MESSAGES}
    found = router.post("/v1/tokenize", key="acme-key", **chat).json()["tokens"]
    assert found == model_tokenizer.encode_chat([default, *MESSAGES])
    found = router.post("/v1/tokenize", key="beta-key", **chat).json()["tokens"]
    assert found == model_tokenizer.encode_chat(MESSAGES)


def test_cached_tokens_are_of_the_tenant_s_own_prompts(open_router: Any) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 5

    def cached(router: Any, tenant: str, **asked: Any) -> int:
        with router.client(tenant) as client:
            usage = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=3, temperature=0, **asked
            ).usage
            return int(usage.prompt_tokens_details.cached_tokens)

    def streamed(router: Any, tenant: str) -> int:
        output = {"stream": True, "stream_options": {"include_usage": True}}
        with router.client(tenant) as client:
            *_, last = client.chat.completions.create(**{**CHAT, "max_tokens": 3, **output})
            return int(last.usage.prompt_tokens_details.cached_tokens)

    with open_router({"acme": {}, "beta": {}}) as router:
        assert cached(router, "acme", n=3) == 0  # its own choices share no cached prefix
        again = cached(router, "acme")
        assert 0 < again < router.complete("acme", prompt=prompt).json()["usage"]["prompt_tokens"]
        assert again % TOKENS_PER_PAGE == 0
        assert cached(router, "acme", n=2) == again
        assert cached(router, "beta") == 0
        assert cached(router, "beta") == again
        assert streamed(router, "beta") == 0
        sample = router.registry.get_sample_value
        hits = sample("vllm:prefix_cache_hits_total", {"model_name": "tiny"})
        assert hits is not None
        assert hits >= 5 * again
        queries = sample("vllm:prefix_cache_queries_total", {"model_name": "tiny"})
        assert queries == sample("vllm:prompt_tokens_total", {"model_name": "tiny"})


def test_the_openapi_schema_requires_a_key(router: Any) -> None:
    schema = router.get("/openapi.json", key="acme-key").json()
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            is_probe = path in ("/health", "/ping", "/load", "/version")
            assert ("401" in operation["responses"]) != is_probe
            assert ("security" in operation) != is_probe


def test_an_invalid_message_is_named_by_its_own_index(router: Any) -> None:
    with router.client("acme") as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**CHAT, "messages": [{"role": "user", "content": None}]})
    assert refused.value.param == "messages[0].content"


def test_a_tenant_s_model_length_is_enforced(router: Any) -> None:
    long = "the quick brown fox " * 12
    with router.client("acme") as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=long, max_tokens=2)
    assert refused.value.code == "context_length_exceeded"
    assert "maximum context length is 100 tokens" in refused.value.message
    with router.client("beta") as client:
        assert client.completions.create(model="tiny", prompt=long, max_tokens=2).choices


def test_a_tenant_s_output_length_is_enforced(router: Any) -> None:
    with router.client("acme") as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{**CHAT, "max_tokens": 21})
        assert (refused.value.param, refused.value.code) == ("max_tokens", "invalid_value")
        assert "max_tokens is too large: 21" in refused.value.message
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
        assert answer.usage.completion_tokens == 20


def test_every_endpoint_is_served_below_a_tenant_s_path(router: Any) -> None:
    for prefix in ("/v1", "/acme/v1"):
        answer = router.post(f"{prefix}/tokenize", key="acme-key", model="acme-chat")
        assert answer.json()["max_model_len"] == 100
        answer = router.post(f"{prefix}/detokenize", key="acme-key", tokens=[70, 71])
        assert answer.json()["prompt"]
        assert router.post(f"{prefix}/embeddings", key="acme-key").status_code == 501
        assert router.post(f"{prefix}/embeddings", key="beta-key?").status_code == 401
    assert router.post("/tokenize", key=None).status_code == 401


def test_a_request_id_is_returned(router: Any) -> None:
    for key in ("acme-key", "wrong"):
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine-7"}
        response = httpx.get(f"{router.url}/acme/v1/models", headers=headers, timeout=60)
        assert response.headers["x-request-id"] == "mine-7"


def test_keys_appear_in_no_log_metric_or_repr(
    router: Any, caplog: pytest.LogCaptureFixture
) -> None:
    router.post("/v1/completions", key="sk-very-secret")
    router.complete("acme")
    output = (
        caplog.text + router.get("/metrics", key="acme-key").text + repr(router.tenancy.__dict__)
    )
    for key in ("sk-very-secret", "acme-key", "beta-key"):
        assert key not in output


def test_a_tenant_s_keys_are_counted(open_router: Any, until: Until) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        router.files.keys("acme", "acme-key", "acme-key-2")
        until(lambda: router.metric("keys", tenant="acme") == 2)
        assert router.tenancy.n_keys() == {"acme": 2, "beta": 1}


@pytest.mark.parametrize("path", ["/v1/messages", "/acme/v1/messages"])
def test_wrong_key_is_refused_in_anthropic_s_form(router: Any, path: str) -> None:
    response = httpx.post(
        f"{router.url}{path}", headers={"x-api-key": "sk-wrong"}, json={}, timeout=60
    )
    assert response.status_code == 401
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
