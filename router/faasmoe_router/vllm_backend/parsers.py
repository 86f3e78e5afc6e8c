"""Which of vLLM's parsers of tool calls and of reasoning a model needs, by its family and template.

A family may have several forms, which the marks in its chat templates tell apart. Imports no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from faasmoe_router.config import VllmArguments

NO_PARSER = "none"
"""Name by which a user turns a parser off that the family would have."""

_Rules = tuple[tuple[str, str], ...]
"""(mark, parser): the first whose mark is in the chat template applies; an empty mark is in all."""

TOOL_CALL_PARSERS: Mapping[str, _Rules] = {
    "Qwen2MoeForCausalLM": (("<tool_call>", "hermes"),),
    "Qwen3MoeForCausalLM": (("<function=", "qwen3_coder"), ("<tool_call>", "hermes")),
    "MixtralForCausalLM": (("[TOOL_CALLS]", "mistral"),),
    "Glm4MoeForCausalLM": (("<arg_key>", "glm45"),),
    "DeepseekV3ForCausalLM": (
        ("<|tool_call_argument_begin|>", "kimi_k2"),
        ("```json", "deepseek_v3"),
        ("<｜tool▁sep｜>", "deepseek_v31"),
    ),
    "GptOssForCausalLM": (("", "openai"),),
}
REASONING_PARSERS: Mapping[str, _Rules] = {
    "Qwen3MoeForCausalLM": (("enable_thinking", "qwen3"), ("assistant\\n<think>", "deepseek_r1")),
    "Glm4MoeForCausalLM": (("<think>", "glm45"),),
    "DeepseekV3ForCausalLM": (
        ("<|tool_call_argument_begin|>", NO_PARSER),
        ("thinking", "deepseek_v3"),
        ("</think>", "deepseek_r1"),
    ),
    "GptOssForCausalLM": (("", "openai_gptoss"),),
}
"""By the model's class in transformers; a family that is missing writes no reasoning."""
GENERIC_TOOL_CALL_PARSER = "hermes"
"""For chat templates without marks of calls: vLLM forces calls in a parser's form only."""


@dataclass(frozen=True, slots=True)
class Parsers:
    """vLLM's names of parsers; None for none.

    Attributes:
        tool_call: of tool calls.
        reasoning: of reasoning.
    """

    tool_call: str | None
    reasoning: str | None


def select_parsers(arguments: VllmArguments, architecture: str, chat_template: str) -> Parsers:
    """Return the parsers that the settings name, else those of the family.

    Args:
        arguments: the settings.
        architecture: the model's class in transformers.
        chat_template: its chat template, or all of them; empty for none.
    """
    generic = (("", GENERIC_TOOL_CALL_PARSER),) if chat_template else ()
    rules = {architecture: (*TOOL_CALL_PARSERS.get(architecture, ()), *generic)}
    return Parsers(
        _select(arguments.tool_call_parser, rules, architecture, chat_template),
        _select(arguments.reasoning_parser, REASONING_PARSERS, architecture, chat_template),
    )


def read_chat_templates(folder: Path) -> tuple[str, ...]:
    """Return the chat templates of a checkpoint's folder; most have one."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        return (file.read_text(),)
    template = json.loads(config.read_text()).get("chat_template") if config.exists() else None
    if isinstance(template, list):
        return tuple(str(entry.get("template", "")) for entry in template)
    return (template,) if template else ()


def _select(
    setting: str | None, rules: Mapping[str, _Rules], architecture: str, chat_template: str
) -> str | None:
    name = setting or next(
        (parser for mark, parser in rules.get(architecture, ()) if mark in chat_template), None
    )
    return None if name == NO_PARSER else name
