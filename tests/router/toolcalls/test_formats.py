import pytest

from faasmoe_router.toolcalls.formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    ToolCallFormat,
    detect_format,
    supports_tools,
)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        pytest.param("{{ messages }}", None, id="no-tools"),
        pytest.param("{% if tools %}{{ tools }}{% endif %}", None, id="tools-in-an-unknown-form"),
        pytest.param(
            "{{ tools }} <tool_call>\n{'name': <name>, 'arguments': <json>}\n</tool_call>",
            HERMES,
            id="qwen-and-hermes",
        ),
        pytest.param("{{ tools }} <tool_call><function=name>", None, id="qwen-coder-in-xml"),
        pytest.param("{{ tools }} <tool_call>name<arg_key>", None, id="glm-in-xml"),
        pytest.param("{{ tools }} [AVAILABLE_TOOLS] [TOOL_CALLS] [", MISTRAL, id="mistral"),
        pytest.param("{{ tools }} [TOOL_CALLS]name[ARGS]{}", None, id="newer-mistral"),
        pytest.param(
            '{{ tools }} respond in the format {"name": function, "parameters": dict}',
            LLAMA,
            id="llama",
        ),
    ],
)
def test_a_template_shows_its_form(template: str, form: ToolCallFormat | None) -> None:
    assert detect_format(template) is form
    assert supports_tools(template) == ("tools" in template)
