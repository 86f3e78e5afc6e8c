"""Tenants with OpenAI's Responses and Anthropic's Messages: isolation, limits and usage."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from faasmoe_router.engine.batcher import TOKENS_PER_PAGE

TEXT = "the quick brown fox jumps over the lazy dog " * 3
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PATHS = (RESPONSES, MESSAGES)


def ask(
    router: Any, path: str, tenant: str = "acme", *, text: str = "fox", n: int = 3, **fields: Any
) -> httpx.Response:
    """Ask one of the APIs for `n` tokens, as a tenant."""
    own: dict[str, Any] = (
        {"input": text, "max_output_tokens": n}
        if path.endswith(RESPONSES)
        else {"messages": [{"role": "user", "content": text}], "max_tokens": n}
    )
    body = {"model": "tiny", "temperature": 0, **own, **fields}
    headers = {"x-api-key": f"{tenant}-key"}
    if path.endswith(RESPONSES):
        headers = {"Authorization": f"Bearer {tenant}-key"}
    return httpx.post(f"{router.url}{path}", json=body, headers=headers, timeout=120)


def test_usage_counts_whole_and_streamed(open_router: Any) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        answers = [ask(router, path).json()["usage"] for path in PATHS]
        for path in PATHS:
            assert b"event: " in ask(router, path, stream=True).content
        counted = router.usage("acme")
        n_input = [usage["input_tokens"] for usage in answers]
        n_cached = answers[1]["cache_read_input_tokens"]
        assert counted["prompt_tokens"] == 4 * n_input[0] == 4 * (n_input[1] + n_cached)
        assert counted["completion_tokens"] == 2 * sum(u["output_tokens"] for u in answers) == 12
        assert counted["requests"]["completed"] == 4
        assert router.usage("beta")["requests"]["completed"] == 0


def test_limits_hold_over_all_apis(open_router: Any) -> None:
    with open_router({"acme": {"limits": {"requestsPerMinute": 2}}, "beta": {}}) as router:
        assert [ask(router, path).status_code for path in PATHS] == [200, 200]
        refused = [ask(router, path) for path in PATHS]
        assert [response.status_code for response in refused] == [429, 429]
        assert all(response.headers["retry-after"] for response in refused)
        of_responses, of_messages = (response.json() for response in refused)
        assert of_responses["error"]["code"] == "rate_limit_exceeded"
        assert (of_messages["type"], of_messages["error"]["type"]) == ("error", "rate_limit_error")
        assert [ask(router, path, "beta").status_code for path in PATHS] == [200, 200]


@pytest.mark.parametrize(
    ("path", "param"), [(RESPONSES, "max_output_tokens"), (MESSAGES, "max_tokens")]
)
def test_output_limit_is_named_as_in_the_api(open_router: Any, path: str, param: str) -> None:
    with open_router({"acme": {"limits": {"maxOutputTokens": 5}}}) as router:
        assert ask(router, path, n=5).is_success
        refused = ask(router, path, n=6)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param} is too large: 6.")


@pytest.mark.parametrize("path", PATHS)
def test_keys_open_only_their_tenant(open_router: Any, path: str) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        assert ask(router, f"/acme{path}").is_success
        assert ask(router, f"/beta{path}").status_code == 401
        assert ask(router, path, "nobody").status_code == 401


def cache_counts(path: str, usage: dict[str, Any]) -> tuple[int, int]:
    """Return how many tokens of a prompt were cached, and how many have been since."""
    if path == MESSAGES:
        return usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    details = usage["input_tokens_details"]
    return details["cached_tokens"], details["cache_write_tokens"]


@pytest.mark.parametrize("path", PATHS)
def test_cache_shows_only_the_tenant_s_own_prompts(open_router: Any, path: str) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        for tenant in ("acme", "beta"):
            n_read, n_created = cache_counts(
                path, ask(router, path, tenant, text=TEXT).json()["usage"]
            )
            assert n_read == 0
            assert n_created > 0
            assert n_created % TOKENS_PER_PAGE == 0
            again = ask(router, path, tenant, text=TEXT).json()["usage"]
            assert sum(cache_counts(path, again)) == n_created
            assert cache_counts(path, again)[0] > 0


def test_parts_of_anthropic_s_usage_make_up_the_prompt(open_router: Any) -> None:
    with open_router({"acme": {}}) as router:
        whole = ask(router, f"{MESSAGES}/count_tokens", text=TEXT).json()["input_tokens"]
        for _ in range(2):
            usage = ask(router, MESSAGES, text=TEXT).json()["usage"]
            parts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
            assert sum(usage[name] for name in parts) == whole


@pytest.mark.parametrize("path", PATHS)
def test_system_prompt_of_the_tenant_comes_first(open_router: Any, path: str) -> None:
    def n_input(usage: dict[str, Any]) -> int:
        return sum(usage.get(name, 0) for name in ("input_tokens", "cache_creation_input_tokens"))

    with open_router({"acme": {"systemPrompt": "Be brief."}, "beta": {}}) as router:
        acme, beta = (n_input(ask(router, path, t).json()["usage"]) for t in ("acme", "beta"))
        assert acme > beta


@pytest.mark.parametrize("path", PATHS)
def test_model_answers_under_the_tenant_s_alias(open_router: Any, path: str) -> None:
    with open_router({"acme": {"modelAlias": "chat"}, "beta": {}}) as router:
        assert ask(router, path, model="chat").json()["model"] == "chat"
        assert ask(router, path, "beta", model="chat").status_code == 404
