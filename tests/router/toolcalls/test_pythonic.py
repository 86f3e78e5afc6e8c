import json
from typing import Any

import pytest

from faasmoe_router.toolcalls.parser import ContentDelta, ToolCallArgumentsDelta, ToolCallStart
from faasmoe_router.toolcalls.pythonic import PythonicToolCallParser, is_pythonic

TOOLS = ("weather", "get-clock")
CALLS = (
    '[weather(city="Rom (a) [b], get-clock(", days=3, tags=["a", {"b": null}], ok=true, x=None), '
    "get-clock()]"
)
ARGUMENTS = {
    "city": "Rom (a) [b], get-clock(",
    "days": 3,
    "tags": ["a", {"b": None}],
    "ok": True,
    "x": None,
}


def parse(text: str, step: int, *, parallel: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    """Return content and calls of a text that arrives `step` characters at a time."""
    parser = PythonicToolCallParser(TOOLS, parallel=parallel)
    pieces = [text[i : i + step] for i in range(0, len(text), step)]
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.flush()
    content = "".join(e.text for e in events if isinstance(e, ContentDelta))
    names = [e.name for e in events if isinstance(e, ToolCallStart)]
    arguments = [json.loads(e.text) for e in events if isinstance(e, ToolCallArgumentsDelta)]
    assert parser.n_calls == len(names)
    return content, list(zip(names, arguments, strict=True))


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize("wrapper", ["{}", "<|python_start|>{}<|python_end|>", "\n{}\n"])
def test_calls_in_a_list_are_parsed(wrapper: str, step: int) -> None:
    assert parse(wrapper.format(CALLS), step) == (
        "",
        [("weather", ARGUMENTS), ("get-clock", {})],
    )


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "It is sunny [weather()].",
        "[1, 2]",
        "[]",
        "[weather",
        "[weather(city='Rome')",
        "[weather('Rome')]",
        "[weather(**{'a': 1})]",
        "[weather(city=open('x'))]",
        "[weather(city=1+x)]",
        "[unknown(city='Rome')]",
        "[weather(), unknown()]",
        "[weather(days=1e999)]",
        "[weather(city=" + "[" * 5000,
        "<|python_start|>print(1)<|python_end|>",
        "",
    ],
)
def test_other_texts_are_content(text: str, step: int) -> None:
    assert parse(text, step) == (text, [])


def test_content_is_not_held_back_once_it_cannot_be_a_list() -> None:
    parser = PythonicToolCallParser(TOOLS)
    assert parser.feed("[wea") == []
    assert parser.feed(" is") == [ContentDelta("[wea is")]
    assert parser.feed(" fine") == [ContentDelta(" fine")]


def test_only_one_call_is_parsed_if_not_parallel() -> None:
    assert parse(CALLS, 7, parallel=False) == ("", [("weather", ARGUMENTS)])


def test_template_tells_the_form() -> None:
    assert is_pythonic("put it in the format of [func_name1(params_name1=params_value1...)]")
    assert not is_pythonic('{"name": function name}')
