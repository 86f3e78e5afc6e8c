"""The forms in which models write calls of tools; a chat template shows its model's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallForm:
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
    begin: str
    end: str
    between: str
    arguments: str = "arguments"
    id_length: int = 24

    @property
    def listed(self) -> bool:
        """Whether several calls stand between one beginning and one end."""
        return bool(self.between)


HERMES = CallForm("hermes", begin="<tool_call>", end="</tool_call>", between="")
MISTRAL = CallForm("mistral", begin="[TOOL_CALLS]", end="]", between="[,", id_length=9)
LLAMA = CallForm("llama", begin="", end="", between=";", arguments="parameters")


def takes_tools(template: str) -> bool:
    """Return whether a chat template tells its model of tools."""
    return "tools" in template


def form_of(template: str) -> CallForm | None:
    """Return the form of calls that a chat template teaches; None if it is none of those known."""
    if not takes_tools(template):
        return None
    if "<tool_call>" in template:
        # Forms of their own between the same marks: XML for Qwen3-Coder, GLM.
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    return LLAMA if '"parameters"' in template and '"name"' in template else None
