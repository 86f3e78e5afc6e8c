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
    ("template", "expected"),
    [
        pytest.param("{{ messages }}", None, id="no-tools"),
        pytest.param("{% if tools %}{{ tools }}{% endif %}", None, id="unknown-format"),
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
def test_detects_format_of_chat_template(template: str, expected: ToolCallFormat | None) -> None:
    assert detect_format(template) is expected
    assert supports_tools(template) == ("tools" in template)
