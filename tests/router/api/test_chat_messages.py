"""What a chat template receives of the messages and tools that real clients send."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

ServeTemplate = Callable[[str], str]

DUMP = "{{ messages | tojson }}\n{{ tools | tojson }}"
DUMP_DEVELOPER = DUMP + "{# system or developer #}"
# Like many published templates: `+` with an undefined value fails.
CONCATENATING = (
    "{% for tool in tools or [] %}{{ tool.function.name + ': ' + tool.function.description }}"
    "{% for name, p in tool.function.parameters.properties.items() %} {{ name }}{% endfor %}"
    "{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
)
USER = {"role": "user", "content": "hi"}


@pytest.fixture
def rendered(serve_template: ServeTemplate) -> Callable[..., tuple[Any, Any]]:
    """Return a function that returns the messages and tools that the template received."""

    def render(
        messages: list[Any], tools: list[Any] | None = None, *, template: str = DUMP
    ) -> tuple[Any, Any]:
        with httpx.Client(base_url=serve_template(template), timeout=120) as http:
            body = {"messages": messages, "tools": tools}
            response = http.post("/tokenize", json=body)
            assert response.status_code == 200, response.text
            tokens = response.json()["tokens"]
            prompt = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        first, _, second = prompt.partition("\n")
        return json.loads(first), json.loads(second)

    return render


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param('{"a": 1}', {"a": 1}, id="text"),
        pytest.param({"a": 1}, {"a": 1}, id="object"),
        pytest.param("", {}, id="empty"),
        pytest.param(None, {}, id="null"),
        pytest.param('{"a": "unfin', {}, id="cut-by-max-tokens"),
        pytest.param("[1]", {}, id="list-text"),
        pytest.param([1], {}, id="list"),
        pytest.param('"x"', {}, id="string"),
        pytest.param("nonsense", {}, id="not-json"),
        pytest.param('{"a": NaN}', {}, id="not-a-number"),
        pytest.param("[" * 5000, {}, id="deep"),
    ],
)
def test_history_with_any_arguments_goes_on(
    rendered: Callable[..., tuple[Any, Any]], arguments: Any, expected: Any
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER]
    messages, _ = rendered(history)
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}


def test_tool_without_description_and_parameters_is_completed(
    rendered: Callable[..., tuple[Any, Any]],
) -> None:
    bare = {"type": "function", "function": {"name": "f"}}
    null = {"type": "function", "function": {"name": "g", "description": None, "parameters": {}}}
    empty = {"type": "object", "properties": {}}
    _, tools = rendered([USER], [bare, null])
    assert [t["function"] for t in tools] == [{"name": n, "parameters": empty} for n in "fg"]
    _, tools = rendered([USER], [bare, null], template=DUMP + "{# tool.description #}")
    assert [tool["function"] for tool in tools] == [
        {"name": name, "description": "", "parameters": empty} for name in "fg"
    ]


def test_tool_without_description_suits_a_template_that_concatenates(
    serve_template: ServeTemplate,
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    url = serve_template(CONCATENATING)
    response = httpx.post(f"{url}/tokenize", json={"messages": [USER], "tools": tools}, timeout=120)
    assert response.status_code == 200, response.text


def test_fields_that_a_template_may_read_are_passed_on(
    rendered: Callable[..., tuple[Any, Any]],
) -> None:
    assistant = {
        "role": "assistant",
        "content": "x",
        "name": "bot",
        "notes": {"steps": [1]},
        "refusal": None,
        "audio": None,
        "function_call": None,
    }
    messages, _ = rendered([{**USER, "name": "me"}, assistant])
    assert messages[0] == {**USER, "name": "me"}
    assert messages[1] == {
        "role": "assistant",
        "content": "x",
        "name": "bot",
        "notes": {"steps": [1]},
    }


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_is_passed_under_both_names(
    rendered: Callable[..., tuple[Any, Any]], field: str
) -> None:
    messages, _ = rendered([{"role": "assistant", "content": "x", field: "because"}])
    assert messages[0]["reasoning"] == messages[0]["reasoning_content"] == "because"


def test_unknown_field_counts_against_the_context(serve_template: ServeTemplate) -> None:
    body = {"messages": [{**USER, "notes": ["x" * 100_000]}]}
    response = httpx.post(f"{serve_template(DUMP)}/tokenize", json=body, timeout=120)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_unknown_field_that_is_not_json_is_named(serve_template: ServeTemplate) -> None:
    body = b'{"messages": [{"role": "user", "content": "a", "x": ["\\ud800"]}]}'
    response = httpx.post(
        f"{serve_template(DUMP)}/tokenize",
        content=body,
        headers={"Content-Type": "application/json"},
        timeout=120,
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[0].x")


@pytest.mark.parametrize(
    ("template", "role"),
    [pytest.param(DUMP, "system", id="unknown"), pytest.param(DUMP_DEVELOPER, "developer")],
)
def test_developer_is_system_where_the_template_knows_no_developer(
    rendered: Callable[..., tuple[Any, Any]], template: str, role: str
) -> None:
    messages, _ = rendered([{"role": "developer", "content": "d"}, USER], template=template)
    assert [message["role"] for message in messages] == [role, "user"]


def test_roles_of_the_template_s_own_are_rendered(
    rendered: Callable[..., tuple[Any, Any]],
) -> None:
    document = {"role": "document", "content": 'a "quoted"\nline'}
    messages, _ = rendered([document, USER])
    assert messages == [document, USER]


def test_role_that_the_template_leaves_out_is_refused(serve_template: ServeTemplate) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    body = {"messages": [{"role": "document", "content": "a"}, {"role": "user", "content": "b"}]}
    response = httpx.post(f"{serve_template(template)}/tokenize", json=body, timeout=120)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert "no role 'document'" in error["message"]


def test_refusals_of_earlier_answers_are_text(rendered: Callable[..., tuple[Any, Any]]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]
    messages, _ = rendered([{"role": "assistant", "content": parts}])
    assert messages[0]["content"] == "ano"
