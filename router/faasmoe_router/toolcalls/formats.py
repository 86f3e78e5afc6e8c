"""Formats in which models write tool calls, and their detection from a chat template."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a model writes tool calls: JSON objects with name and arguments, between markers.

    Attributes:
        name: name of the format.
        start_marker: text before calls; empty if the whole text consists of calls.
        end_marker: text after each call, or after all calls of a list.
        separators: characters allowed between calls, besides whitespace.
        arguments_key: key of the arguments in a call's object.
        call_id_length: length in characters of the call ids that the chat template accepts.
    """

    name: str
    start_marker: str
    end_marker: str
    separators: str
    arguments_key: str = "arguments"
    call_id_length: int = 24

    @property
    def is_list(self) -> bool:
        """Whether one pair of markers encloses all calls."""
        return bool(self.separators)


HERMES = ToolCallFormat(
    "hermes", start_marker="<tool_call>", end_marker="</tool_call>", separators=""
)
MISTRAL = ToolCallFormat(
    "mistral", start_marker="[TOOL_CALLS]", end_marker="]", separators="[,", call_id_length=9
)
LLAMA = ToolCallFormat(
    "llama", start_marker="", end_marker="", separators=";", arguments_key="parameters"
)


def supports_tools(chat_template: str) -> bool:
    """Return whether a chat template renders tools."""
    return "tools" in chat_template


def detect_format(chat_template: str) -> ToolCallFormat | None:
    """Return the tool call format of a chat template; None if it has none or an unknown one."""
    if not supports_tools(chat_template):
        return None
    if "<tool_call>" in chat_template:
        # Qwen3-Coder and GLM write XML between the same markers.
        return None if "<function=" in chat_template or "<arg_key>" in chat_template else HERMES
    if "[TOOL_CALLS]" in chat_template:
        return None if "[ARGS]" in chat_template else MISTRAL
    return LLAMA if '"parameters"' in chat_template and '"name"' in chat_template else None
