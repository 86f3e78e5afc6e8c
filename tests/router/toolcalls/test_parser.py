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

Parsed = tuple[str, list[tuple[str, str]]]  # content, (name, arguments) of each call
TOOL_NAMES = {"f", "g"}
TRICKY_ARGUMENTS = '{"a": "}{</tool_call>\\"<tool_call>", "b": [{}, "日"]}'


def _parse(call_format: ToolCallFormat, pieces: list[str], *, parallel: bool = True) -> Parsed:
    parser = ToolCallParser(call_format, TOOL_NAMES, parallel=parallel)
    events: list[ToolCallEvent] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.flush()
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    calls = [[event.name, ""] for event in events if isinstance(event, ToolCallStart)]
    for event in events:
        if isinstance(event, ToolCallArgumentsDelta):
            calls[event.index][1] += event.text
    assert parser.n_calls == len(calls)
    return content, [(name, arguments) for name, arguments in calls]


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TEXTS = [
    pytest.param(
        HERMES, _hermes("f", TRICKY_ARGUMENTS), ("", [("f", TRICKY_ARGUMENTS)]), id="hermes"
    ),
    pytest.param(
        HERMES,
        f"I look.\n{_hermes('f', '{}')}\n{_hermes('g', '{}')}\n",
        ("I look.\n", [("f", "{}"), ("g", "{}")]),
        id="hermes-after-content",
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
        id="arguments-as-string",
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
        id="object-without-name",
    ),
    pytest.param(
        HERMES,
        f"<tool_call>no{_hermes('f', '{}')}",
        ("<tool_call>no", [("f", "{}")]),
        id="call-after-unparsable-marker",
    ),
    pytest.param(HERMES, "1 < 2 <tool_cal", ("1 < 2 <tool_cal", []), id="partial-marker"),
    pytest.param(
        HERMES, '<tool_call>{"name": "f', ('<tool_call>{"name": "f', []), id="partial-head"
    ),
    pytest.param(
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "b',
        ("", [("f", '{"a": "b')]),
        id="partial-arguments",
    ),
    pytest.param(HERMES, "  \n", ("  \n", []), id="blank"),
    pytest.param(
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {TRICKY_ARGUMENTS}}}, '
        '{"name": "g", "arguments": {}}]',
        ("", [("f", TRICKY_ARGUMENTS), ("g", "{}")]),
        id="mistral",
    ),
    pytest.param(MISTRAL, "[TOOL] [1, 2]", ("[TOOL] [1, 2]", []), id="mistral-content"),
    pytest.param(
        LLAMA,
        f'{{"name": "f", "parameters": {TRICKY_ARGUMENTS}}}; {{"name": "g", "parameters": {{}}}}',
        ("", [("f", TRICKY_ARGUMENTS), ("g", "{}")]),
        id="llama",
    ),
    pytest.param(
        LLAMA,
        '{"name": "h", "parameters": {}} x',
        ('{"name": "h", "parameters": {}} x', []),
        id="llama-unknown-tool",
    ),
    pytest.param(LLAMA, '{"a": 1}', ('{"a": 1}', []), id="llama-other-json"),
    pytest.param(LLAMA, 'Say {"name": "f"}', ('Say {"name": "f"}', []), id="llama-content"),
]


@pytest.mark.parametrize(("call_format", "text", "expected"), TEXTS)
@pytest.mark.parametrize("piece_length", [1, 2, 3, 7, 1000])
def test_parses_calls_from_pieces_of_any_length(
    call_format: ToolCallFormat, text: str, expected: Parsed, piece_length: int
) -> None:
    pieces = [text[start : start + piece_length] for start in range(0, len(text), piece_length)]
    assert _parse(call_format, pieces) == expected


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
    call_format=st.sampled_from([HERMES, MISTRAL, LLAMA]),
)
def test_result_is_independent_of_text_boundaries(
    texts: list[str], call_format: ToolCallFormat
) -> None:
    assert _parse(call_format, texts) == _parse(call_format, ["".join(texts)])


@given(text=st.text(alphabet='<>/tolca_{}"[] \n', max_size=60))
def test_text_without_calls_is_returned_as_content(text: str) -> None:
    assert _parse(HERMES, list(text)) == (text, [])


def test_parses_only_the_first_call_unless_parallel() -> None:
    text = f"{_hermes('f', '{}')}\n{_hermes('g', '{}')} and more"
    assert _parse(HERMES, list(text), parallel=False) == ("", [("f", "{}")])


def test_arguments_are_streamed() -> None:
    parser = ToolCallParser(HERMES, TOOL_NAMES)
    assert parser.feed('<tool_call>{"name": "f", "arguments": {') == [
        ToolCallStart(0, "f"),
        ToolCallArgumentsDelta(0, "{"),
    ]
    assert parser.feed('"a": 1') == [ToolCallArgumentsDelta(0, '"a": 1')]
    assert parser.feed("}}") == [ToolCallArgumentsDelta(0, "}")]


def test_parses_long_name_in_linear_time() -> None:
    name = "n" * 20 * MAX_HEAD_LENGTH
    text = _hermes(name, "{}")
    assert _parse(HERMES, list(text)) == ("", [(name, "{}")])


def test_deeply_nested_arguments_are_content() -> None:
    nested = "[" * 100_000 + "]" * 100_000
    text = f'<tool_call>{{"arguments": {nested}, "name": "f"}}</tool_call>'
    content, calls = _parse(HERMES, [text])
    assert (content, calls) == (text, [])


def test_arguments_are_returned_verbatim() -> None:
    _, [(_, arguments)] = _parse(HERMES, [_hermes("f", TRICKY_ARGUMENTS)])
    assert arguments == TRICKY_ARGUMENTS
    assert json.loads(arguments)["b"] == [{}, "日"]
