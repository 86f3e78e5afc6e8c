import pytest

from faasmoe_router.toolcalls.formats import HERMES
from faasmoe_router.toolcalls.harmony import HarmonyParser
from faasmoe_router.toolcalls.message import AnyMessageParser, MessageParser
from faasmoe_router.toolcalls.parser import (
    ContentDelta,
    ToolCallArgumentsDelta,
    ToolCallParser,
    ToolCallStart,
)
from faasmoe_router.toolcalls.reasoning import (
    REASONING_FORMATS,
    ReasoningDelta,
    ReasoningParser,
    detect_reasoning_format,
)

THINK, MISTRAL = REASONING_FORMATS


def parts(parser: AnyMessageParser, text: str, step: int) -> tuple[str, str, str]:
    """Return reasoning, content and calls, each joined."""
    events = []
    for start in range(0, len(text), step):
        events += parser.feed(text[start : start + step])
    events += parser.flush()
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    content = "".join(e.text for e in events if isinstance(e, ContentDelta))
    calls = "".join(
        f"{e.name}:" if isinstance(e, ToolCallStart) else e.text
        for e in events
        if isinstance(e, ToolCallStart | ToolCallArgumentsDelta)
    )
    return reasoning, content, calls


@pytest.mark.parametrize("step", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        pytest.param("<think>\na < b\n</think>\n\nyes", False, ("a < b", "yes"), id="qwen3"),
        pytest.param("\n<think>x</think>y", False, ("x", "y"), id="line-break-first"),
        pytest.param("a\n\nb\n</think>\n\nyes", True, ("a\n\nb", "yes"), id="deepseek-r1"),
        pytest.param("x <thi", True, ("x <thi", ""), id="cut-in-reasoning"),
        pytest.param("<think>", False, ("", ""), id="only-the-mark"),
        pytest.param("<thin", False, ("", "<thin"), id="part-of-the-mark"),
        pytest.param("yes </think> no", False, ("", "yes </think> no"), id="none"),
        pytest.param("<think></think>yes", False, ("", "yes"), id="empty"),
    ],
)
def test_reasoning_is_separated(
    text: str, is_open: bool, expected: tuple[str, str], step: int
) -> None:
    parser = MessageParser(ReasoningParser(THINK, is_open=is_open), None)
    reasoning, content, _ = parts(parser, text, step)
    assert (reasoning, content) == expected


@pytest.mark.parametrize("step", [1, 1000])
def test_a_mark_of_a_call_within_reasoning_is_not_a_call(step: int) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = MessageParser(ReasoningParser(THINK, is_open=True), ToolCallParser(HERMES, {"f"}))
    assert parts(parser, f"I could {call}\n</think>{call}", step) == (f"I could {call}", "", "f:{}")


def test_formats_are_told_by_the_template_and_the_prompt() -> None:
    assert detect_reasoning_format("{{ content.split('</think>') }}") is THINK
    assert detect_reasoning_format("[THINK]..[/THINK]") is MISTRAL
    assert detect_reasoning_format("{{ messages }}") is None
    assert THINK.is_open_after("<|assistant|><think>\n")
    assert not THINK.is_open_after("<think>\n\n</think>\n\n")


HARMONY = (
    "<|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant"
    "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": "Rome"}<|call|>'
)


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_harmony_channels(step: int) -> None:
    expected = ("I need the weather.", "One moment.", 'weather:{"city": "Rome"}')
    assert parts(HarmonyParser(), HARMONY, step) == expected
    final = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    assert parts(HarmonyParser(), final, step) == ("Hm", "Hi", "")


def test_recipient_before_the_channel_is_a_call() -> None:
    text = " to=functions.f<|channel|>commentary json<|message|>{}<|call|>"
    assert parts(HarmonyParser(), text, 3) == ("", "", "f:{}")


def test_only_one_call_without_parallel_calls() -> None:
    call = "<|channel|>commentary to=functions.f<|message|>{}<|call|><|start|>assistant"
    assert parts(HarmonyParser(parallel=False), call * 2, 9) == ("", "", "f:{}")
    assert parts(HarmonyParser(), call * 2, 9) == ("", "", "f:{}f:{}")


def test_text_without_channels_is_content() -> None:
    assert parts(HarmonyParser(), "hello", 2) == ("", "hello", "")
