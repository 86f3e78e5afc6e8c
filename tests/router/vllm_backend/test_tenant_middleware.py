import json
from typing import Any

import pytest

from faasmoe_router.api.errors import ApiError
from faasmoe_router.tenants.service import Caller
from faasmoe_router.vllm_backend.tenant_middleware import parse_body, system_prompt, token_limit

CHAT, ANTHROPIC, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CALLER = Caller("acme", model_alias="acme-chat", system_prompt="Be brief.")
USER = {"role": "user", "content": "Hello"}


def rewritten(body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    value = parse_body(json.dumps(body).encode(), CALLER, "moe")
    return value | system_prompt(value, path, CALLER)


@pytest.mark.parametrize("name", ["moe", "acme-chat"])
def test_an_alias_stands_for_the_models_name(name: str) -> None:
    assert rewritten({"model": name, "messages": []})["model"] == "moe"


def test_another_models_name_is_refused() -> None:
    with pytest.raises(ApiError, match="`other-tenants-alias` does not exist") as caught:
        rewritten({"model": "other-tenants-alias"})
    assert caught.value.status == 404


def test_a_tenants_system_prompt_is_added_unless_the_request_has_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert rewritten({"messages": [USER]})["messages"] == [system, USER]
    own = {"role": "system", "content": "Rhyme."}
    assert rewritten({"messages": [own, USER]})["messages"] == [own, USER]
    assert rewritten({"messages": [USER]}, ANTHROPIC)["system"] == "Be brief."
    assert rewritten({"system": "Rhyme."}, ANTHROPIC)["system"] == "Rhyme."
    assert rewritten({"input": "Hello"}, RESPONSES)["instructions"] == "Be brief."


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b'"x"'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(body, CALLER, "moe")
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_more_tokens_than_a_tenant_may_generate_are_refused(name: str) -> None:
    caller = Caller("acme", max_output_tokens=8)
    assert token_limit({name: 8}, caller) == 8
    assert token_limit({name: None}, caller) is None
    with pytest.raises(ApiError, match=f"^{name} is too large: 9. Your tenant may generate at m"):
        token_limit({name: 9}, caller)
