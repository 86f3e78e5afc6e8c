"""Reasoning in a model's text: how it is marked, and a streaming parser that separates it.

Most models write `<think>...</think>` before their answer. Some templates open the reasoning in the
prompt, and some close it there to turn it off, so where a text starts depends on its prompt.
"""

from dataclasses import dataclass

from faasmoe_router.toolcalls.parser import ContentDelta, partial_marker_length


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The text before and after reasoning."""

    start_marker: str
    end_marker: str

    def is_open_after(self, prompt: str) -> bool:
        """Return whether a prompt, or its end, opens reasoning that the model continues."""
        return prompt.rstrip().endswith(self.start_marker)

    def is_closed_after(self, prompt: str) -> bool:
        """Return whether a prompt, or its end, closes reasoning, so that the model writes none."""
        return prompt.rstrip().endswith(self.end_marker)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text that is reasoning."""

    text: str


REASONING_FORMATS = (
    ReasoningFormat("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, MiniMax, Kimi
    ReasoningFormat("[THINK]", "[/THINK]"),  # Mistral
)


def detect_reasoning_format(chat_template: str) -> ReasoningFormat | None:
    """Return the format of a chat template's reasoning; None if it has none."""
    for reasoning_format in REASONING_FORMATS:
        if reasoning_format.end_marker in chat_template:
            return reasoning_format
    return None


class ReasoningParser:
    """Separates the reasoning at the start of one text from the rest.

    Args:
        reasoning_format: how reasoning is marked.
        is_open: whether the text starts within reasoning, which the prompt has opened.

    Attributes:
        is_reasoning: whether the text so far ends within reasoning.
    """

    def __init__(self, reasoning_format: ReasoningFormat, *, is_open: bool) -> None:
        self._format = reasoning_format
        self.is_reasoning = is_open
        self._is_at_start = not is_open
        self._follows_reasoning = False
        self._has_emitted = False
        self._buffer = ""

    def feed(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        """Parse more text; return what it completes."""
        self._buffer += text
        if self._is_at_start and not self._read_start():
            return []
        if not self.is_reasoning:
            return self._take(len(self._buffer))
        end = self._buffer.find(self._format.end_marker)
        if end < 0:
            held = partial_marker_length(self._buffer, self._format.end_marker)
            return self._take(len(self._buffer[: len(self._buffer) - held].rstrip()))
        reasoning = self._take(len(self._buffer[:end].rstrip()))
        self._buffer = self._buffer.lstrip().removeprefix(self._format.end_marker)
        self.is_reasoning, self._has_emitted, self._follows_reasoning = False, False, True
        return [*reasoning, *self._take(len(self._buffer))]

    def flush(self) -> list[ReasoningDelta | ContentDelta]:
        """Return the text held back; called at the end of the text."""
        return self._take(len(self._buffer))

    def _read_start(self) -> bool:
        """Decide whether the text starts with reasoning; return False if that is still open."""
        text, marker = self._buffer.lstrip(), self._format.start_marker
        if text.startswith(marker):
            self.is_reasoning, self._buffer = True, text.removeprefix(marker)
        elif marker.startswith(text):
            return False
        self._is_at_start = False
        return True

    def _take(self, n_characters: int) -> list[ReasoningDelta | ContentDelta]:
        text, self._buffer = self._buffer[:n_characters], self._buffer[n_characters:]
        if not self._has_emitted and (self.is_reasoning or self._follows_reasoning):
            text = text.lstrip()
        self._has_emitted = self._has_emitted or bool(text)
        if not text:
            return []
        return [ReasoningDelta(text) if self.is_reasoning else ContentDelta(text)]
