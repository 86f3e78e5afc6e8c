"""The forms in which models write calls of tools; a chat template shows its model's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How calls stand in a text: JSON objects of a name and arguments, between marks.

    Attributes:
        name: the form's name.
        begin: what calls begin with; empty if calls are all there is, from the text's beginning.
        end: what ends them, after one call or after all.
        between: characters that may stand between calls, besides whitespace.
        arguments: the member that holds a call's arguments.
        id_length: the characters of a call's id that the template will take back.
    """

    name: str
    start_marker: str
    end_marker: str
    separators: str
    arguments_key: str = "arguments"
    call_id_length: int = 24

    @property
    def is_list(self) -> bool:
        """Whether several calls stand between one beginning and one end."""
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
    """Return whether a chat template tells its model of tools."""
    return "tools" in chat_template


def detect_format(chat_template: str) -> ToolCallFormat | None:
    """Return the form of calls that a chat template teaches; None if it is none of those known."""
    if not supports_tools(chat_template):
        return None
    if "<tool_call>" in chat_template:
        # Forms of their own between the same marks: XML for Qwen3-Coder, GLM.
        return None if "<function=" in chat_template or "<arg_key>" in chat_template else HERMES
    if "[TOOL_CALLS]" in chat_template:
        return None if "[ARGS]" in chat_template else MISTRAL
    return LLAMA if '"parameters"' in chat_template and '"name"' in chat_template else None
