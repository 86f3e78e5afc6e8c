import json
from typing import Any

import pytest

from faasmoe_router.toolcalls.blocks import BlockToolCallParser, detect_block_format
from faasmoe_router.toolcalls.parser import ContentDelta, ToolCallArgumentsDelta, ToolCallStart

SCHEMAS = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "clock": {},
}
ARGUMENTS = {"city": "12 <b>Röm</b>\nEast", "days": 3, "tags": ["a", "b"]}
JSON_ARGUMENTS = json.dumps(ARGUMENTS, ensure_ascii=False)

# Mark of the chat template -> text of a call of weather with ARGUMENTS and one of clock.
CALLS = {
    "<tool_call> <function=": (
        "<tool_call>\n<function=weather>\n<parameter=city>\n12 <b>Röm</b>\nEast\n</parameter>\n"
        '<parameter=days>\n3\n</parameter>\n<parameter=tags>\n["a", "b"]\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>\n</tool_call>"
    ),
    "<tool_call> <arg_key>": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>12 <b>Röm</b>\nEast</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n<arg_key>tags</arg_key>\n"
        "<arg_value>['a', 'b']</arg_value>\n</tool_call>\n<tool_call>clock\n</tool_call>"
    ),
    "<minimax:tool_call>": (
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">12 <b>Röm</b>\nEast'
        '</parameter>\n<parameter name="days">3</parameter>\n<parameter name="tags">["a", "b"]'
        '</parameter>\n</invoke>\n<invoke name="clock">\n</invoke>\n</minimax:tool_call>'
    ),
    "<｜tool▁calls▁begin｜> ```json <｜tool▁sep｜>": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{JSON_ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n"
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "<｜tool▁calls▁begin｜> <｜tool▁sep｜>": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{JSON_ARGUMENTS}"
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>"
    ),
    "<|tool_call_argument_begin|>": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{JSON_ARGUMENTS}<|tool_call_end|><|tool_call_begin|>"
        "functions.clock:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    ),
    "[TOOL_CALLS] [ARGS]": (
        f"[TOOL_CALLS]weather[ARGS]{JSON_ARGUMENTS}[TOOL_CALLS]clock[CALL_ID]abc123def[ARGS]{{}}"
    ),
}


def parse(
    mark: str, text: str, step: int, *, parallel: bool = True
) -> tuple[str, list[tuple[str, Any]]]:
    block_format = detect_block_format(f"{{% if tools %}}{mark}")
    assert block_format is not None
    parser = BlockToolCallParser(block_format, SCHEMAS, parallel=parallel)
    events = []
    for start in range(0, len(text), step):
        events += parser.feed(text[start : start + step])
    events += parser.flush()
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, ToolCallArgumentsDelta):
            arguments[event.index] += event.text
    assert parser.n_calls == len(names)
    return content, list(zip(names, map(json.loads, arguments), strict=True))


@pytest.mark.parametrize("step", [1, 3, 10_000])
@pytest.mark.parametrize("mark", CALLS)
def test_calls_are_parsed_however_the_text_arrives(mark: str, step: int) -> None:
    content, calls = parse(mark, f"Let me see.\n{CALLS[mark]}", step)
    assert calls == [("weather", ARGUMENTS), ("clock", {})]
    assert content == "Let me see."


@pytest.mark.parametrize("mark", CALLS)
def test_only_the_first_call_counts_without_parallel_calls(mark: str) -> None:
    _, calls = parse(mark, CALLS[mark], 5, parallel=False)
    assert calls == [("weather", ARGUMENTS)]


@pytest.mark.parametrize("step", [1, 10_000])
@pytest.mark.parametrize("mark", CALLS)
def test_text_without_calls_is_content(mark: str, step: int) -> None:
    text = "a < b, [TOOL, <tool_ca and\n\nmore <\n"
    assert parse(mark, text, step) == (text, [])


@pytest.mark.parametrize("mark", [mark for mark in CALLS if mark != "[TOOL_CALLS] [ARGS]"])
def test_call_that_is_cut_short_is_content(mark: str) -> None:
    text = CALLS[mark][:40]
    content, calls = parse(mark, text, 4)
    assert calls == []
    assert content.strip() == text.strip()


@pytest.mark.parametrize(
    ("value", "expected"),
    [("3", 3), ("true", True), ("True", True), ("{'a': None}", {"a": None}), ("x y", "x y")],
)
def test_value_without_a_schema_is_what_it_looks_like(value: str, expected: Any) -> None:
    text = f"<tool_call><function=f><parameter=x>\n{value}\n</parameter></function></tool_call>"
    assert parse("<function=", text, 7)[1] == [("f", {"x": expected})]


def test_other_templates_have_no_block_format() -> None:
    assert detect_block_format("{% if tools %}<tool_call>{% endif %}") is None
    assert detect_block_format("```json") is None
