import json
from typing import Any

import pytest

from faasmoe_router.api.errors import ApiError
from faasmoe_router.tenants.service import Caller
from faasmoe_router.vllm_backend.tenant_middleware import rewritten_body

CHAT, ANTHROPIC, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CALLER = Caller("acme", model_alias="acme-chat", system_prompt="Be brief.")
USER = {"role": "user", "content": "Hello"}


def rewritten(body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    return dict(json.loads(rewritten_body(json.dumps(body).encode(), path, CALLER, "moe")))


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
        rewritten_body(body, CHAT, CALLER, "moe")
    assert caught.value.status == 400
