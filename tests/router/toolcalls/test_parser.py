import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.toolcalls.formats import HERMES, LLAMA, MISTRAL, ToolCallFormat
from faasmoe_router.toolcalls.parser import (
    MAX_HEAD_LENGTH,
    ContentDelta,
    ToolCallArgumentsDelta,
    ToolCallEvent,
    ToolCallParser,
    ToolCallStart,
)

Read = tuple[str, list[tuple[str, str]]]
NAMES = {"f", "g"}
TRICKY = '{"a": "}{</tool_call>\\"<tool_call>", "b": [{}, "日"]}'


def _read(form: ToolCallFormat, pieces: list[str], *, many: bool = True) -> Read:
    parser = ToolCallParser(form, NAMES, parallel=many)
    found: list[ToolCallEvent] = []
    for piece in pieces:
        found += parser.feed(piece)
    found += parser.flush()
    content = "".join(said.text for said in found if isinstance(said, ContentDelta))
    calls = [[begun.name, ""] for begun in found if isinstance(begun, ToolCallStart)]
    for part in found:
        if isinstance(part, ToolCallArgumentsDelta):
            calls[part.index][1] += part.text
    assert parser.n_calls == len(calls)
    return content, [(name, arguments) for name, arguments in calls]


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TEXTS = [
    pytest.param(HERMES, _hermes("f", TRICKY), ("", [("f", TRICKY)]), id="hermes"),
    pytest.param(
        HERMES,
        f"I look.\n{_hermes('f', '{}')}\n{_hermes('g', '{}')}\n",
        ("I look.\n", [("f", "{}"), ("g", "{}")]),
        id="hermes-after-words",
    ),
    pytest.param(
        HERMES,
        '<tool_call>{"arguments": {"x": 2}, "name": "f"}</tool_call>',
        ("", [("f", '{"x": 2}')]),
        id="arguments-first",
    ),
    pytest.param(
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": 2}"}</tool_call>',
        ("", [("f", '{"x": 2}')]),
        id="arguments-as-text",
    ),
    pytest.param(
        HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")]), id="no-arguments"
    ),
    pytest.param(
        HERMES, "a <tool_call>b</tool_call>", ("a <tool_call>b</tool_call>", []), id="no-object"
    ),
    pytest.param(
        HERMES,
        '<tool_call>{"x": 1}</tool_call>',
        ('<tool_call>{"x": 1}</tool_call>', []),
        id="no-call",
    ),
    pytest.param(
        HERMES,
        f"<tool_call>no{_hermes('f', '{}')}",
        ("<tool_call>no", [("f", "{}")]),
        id="no-call-and-then-one",
    ),
    pytest.param(HERMES, "1 < 2 <tool_cal", ("1 < 2 <tool_cal", []), id="half-a-mark"),
    pytest.param(
        HERMES, '<tool_call>{"name": "f', ('<tool_call>{"name": "f', []), id="half-a-head"
    ),
    pytest.param(
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "b',
        ("", [("f", '{"a": "b')]),
        id="half-of-the-arguments",
    ),
    pytest.param(HERMES, "  \n", ("  \n", []), id="blank"),
    pytest.param(
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {TRICKY}}}, '
        '{"name": "g", "arguments": {}}]',
        ("", [("f", TRICKY), ("g", "{}")]),
        id="mistral",
    ),
    pytest.param(MISTRAL, "[TOOL] [1, 2]", ("[TOOL] [1, 2]", []), id="mistral-words"),
    pytest.param(
        LLAMA,
        f'{{"name": "f", "parameters": {TRICKY}}}; {{"name": "g", "parameters": {{}}}}',
        ("", [("f", TRICKY), ("g", "{}")]),
        id="llama",
    ),
    pytest.param(
        LLAMA,
        '{"name": "h", "parameters": {}} x',
        ('{"name": "h", "parameters": {}} x', []),
        id="llama-unknown-tool",
    ),
    pytest.param(LLAMA, '{"a": 1}', ('{"a": 1}', []), id="llama-other-json"),
    pytest.param(LLAMA, 'Say {"name": "f"}', ('Say {"name": "f"}', []), id="llama-words"),
]


@pytest.mark.parametrize(("form", "text", "expected"), TEXTS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000])
def test_calls_are_read_however_the_text_comes(
    form: ToolCallFormat, text: str, expected: Read, length: int
) -> None:
    pieces = [text[at : at + length] for at in range(0, len(text), length)]
    assert _read(form, pieces) == expected


@given(
    texts=st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "{",
                "}",
                '"name": "f"',
                '"',
                "\\",
                " ",
                "x",
                "[",
                ",",
                ";",
            ]
        ),
        max_size=12,
    ),
    form=st.sampled_from([HERMES, MISTRAL, LLAMA]),
)
def test_whatever_comes_is_read_alike_in_pieces_and_whole(
    texts: list[str], form: ToolCallFormat
) -> None:
    assert _read(form, texts) == _read(form, ["".join(texts)])


@given(text=st.text(alphabet='<>/tolca_{}"[] \n', max_size=60))
def test_a_text_without_calls_comes_out_as_it_is(text: str) -> None:
    assert _read(HERMES, list(text)) == (text, [])


def test_only_the_first_call_is_read_where_one_is_wanted() -> None:
    text = f"{_hermes('f', '{}')}\n{_hermes('g', '{}')} and more"
    assert _read(HERMES, list(text), many=False) == ("", [("f", "{}")])


def test_arguments_come_while_they_are_written() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.feed('<tool_call>{"name": "f", "arguments": {') == [
        ToolCallStart(0, "f"),
        ToolCallArgumentsDelta(0, "{"),
    ]
    assert parser.feed('"a": 1') == [ToolCallArgumentsDelta(0, '"a": 1')]
    assert parser.feed("}}") == [ToolCallArgumentsDelta(0, "}")]


def test_a_long_name_is_read_in_linear_time() -> None:
    name = "n" * 20 * MAX_HEAD_LENGTH
    text = _hermes(name, "{}")
    assert _read(HERMES, list(text)) == ("", [(name, "{}")])


def test_deep_arguments_are_no_call() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    text = f'<tool_call>{{"arguments": {deep}, "name": "f"}}</tool_call>'
    content, calls = _read(HERMES, [text])
    assert (content, calls) == (text, [])


def test_arguments_are_json_as_it_was_written() -> None:
    _, [(_, arguments)] = _read(HERMES, [_hermes("f", TRICKY)])
    assert arguments == TRICKY
    assert json.loads(arguments)["b"] == [{}, "日"]
