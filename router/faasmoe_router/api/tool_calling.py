"""Tool calling of one chat request: the call format, the grammar and the parser of its output.

The format in which the model writes calls is detected from its chat template. A grammar enforces
calls where `tool_choice` demands them. The formats, grammars and parsers themselves are in
`faasmoe_router.toolcalls`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from faasmoe_router.api.errors import invalid_value, unsupported_param
from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.engine.structured_output import JSON_OPTIONS, GrammarSource
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.toolcalls.formats import HERMES, ToolCallFormat, detect_format, supports_tools
from faasmoe_router.toolcalls.grammar import ToolSpec, tool_call_grammar
from faasmoe_router.toolcalls.parser import ToolCallParser


@dataclass(frozen=True, slots=True)
class ToolCallConfig:
    """How the model calls tools in one chat.

    Attributes:
        call_format: the format in which the model writes calls.
        template_tools: the tools as the chat template expects them.
        tool_names: the tools' names.
        choice_mode: whether the model decides, must call some tool, or must call a named one.
        is_parallel: whether the model may make several calls.
        grammar: constrains the text to calls; None if calls are not enforced.
    """

    call_format: ToolCallFormat
    template_tools: tuple[Mapping[str, Any], ...]
    tool_names: frozenset[str]
    choice_mode: Literal["auto", "required", "named"]
    is_parallel: bool
    grammar: GrammarSource | None

    def new_parser(self) -> ToolCallParser:
        """Return a parser for the calls in the text of one choice."""
        return ToolCallParser(self.call_format, self.tool_names, parallel=self.is_parallel)


def resolve_tool_calling(
    body: ChatCompletionRequest, tokenizer: ModelTokenizer
) -> ToolCallConfig | None:
    """Return how the model calls tools in this chat; None if it may not call any.

    Raises:
        ApiError: the chat template does not support this, or another parameter conflicts with it.
    """
    tool_choice = body.effective_tool_choice
    if not body.tools or tool_choice.mode == "none":
        return None
    if not supports_tools(tokenizer.tool_chat_template):
        raise unsupported_param("tools", "is not supported by this model's chat template")
    call_format = detect_format(tokenizer.tool_chat_template)
    if call_format is None and tool_choice.mode == "auto":
        raise unsupported_param(
            "tools",
            "requires 'tool_choice' to be 'required' or a named function with this model's chat "
            "template",
        )
    is_parallel = tool_choice.mode != "named" and body.parallel_tool_calls is not False
    call_format = call_format or HERMES
    return ToolCallConfig(
        call_format=call_format,
        template_tools=tuple(tool.to_template() for tool in body.tools),
        tool_names=frozenset(tool.function.name for tool in body.tools),
        choice_mode=tool_choice.mode,
        is_parallel=is_parallel,
        grammar=_tool_call_grammar(body, tokenizer, call_format, is_parallel=is_parallel),
    )


def _tool_call_grammar(
    body: ChatCompletionRequest,
    tokenizer: ModelTokenizer,
    call_format: ToolCallFormat,
    *,
    is_parallel: bool,
) -> GrammarSource | None:
    """Return the grammar that enforces calls.

    With `tool_choice` auto and a `response_format`, the text is calls or else JSON of that format;
    without a format nothing is enforced. With required or named calls, no other constraint is
    allowed except a `response_format`, which calls take the place of.
    """
    fallback_schema = None
    if body.effective_tool_choice.mode == "auto":
        if body.response_format is None:
            return None
        fallback_schema = body.response_format.grammar.text
    else:
        structured_output = body.resolved_structured_output
        if structured_output is not None and body.response_format is None:
            raise invalid_value(structured_output.param, "not allowed together with 'tool_choice'")

    def token_literal(text: str) -> str:
        token = tokenizer.special_token_id(text)
        return f'"{text}"' if token is None else f"<[{token}]>"

    text = tool_call_grammar(
        _callable_tools(body),
        call_format,
        encode_marker=token_literal,
        json_options=JSON_OPTIONS,
        parallel=is_parallel,
        alternative_schema=fallback_schema,
    )
    return GrammarSource("lark", text)


def _callable_tools(body: ChatCompletionRequest) -> Sequence[ToolSpec]:
    tool_choice = body.effective_tool_choice
    functions = [tool.function for tool in body.tools or ()]
    return [
        ToolSpec(function.name, function.parameters)
        for function in functions
        if tool_choice.mode != "named" or function.name == tool_choice.name
    ]
