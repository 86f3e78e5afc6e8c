"""How a chat's tools are called: by which form, in which grammar, and which calls are wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.api.structured_outputs import StructuredOutput
from faasmoe_router.api.validation import unsupported_param
from faasmoe_router.engine.structured_output import JSON_OPTIONS, GrammarSource
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.toolcalls.formats import HERMES, ToolCallFormat, detect_format, supports_tools
from faasmoe_router.toolcalls.grammar import ToolSpec, tool_call_grammar
from faasmoe_router.toolcalls.parser import ToolCallParser


@dataclass(frozen=True, slots=True)
class ToolCallConfig:
    """How one chat's tools are called.

    Attributes:
        call_format: how the model writes calls.
        template_tools: the tools, as the chat template takes them.
        tool_names: the tools' names.
        choice_mode: whether calls are up to the model, wanted, or wanted of one tool.
        many: whether several calls may be made.
        grammar: what holds the text to calls, if it is to be held.
    """

    call_format: ToolCallFormat
    template_tools: tuple[Mapping[str, Any], ...]
    tool_names: frozenset[str]
    choice_mode: Literal["auto", "required", "named"]
    is_parallel: bool
    grammar: GrammarSource | None

    def new_parser(self) -> ToolCallParser:
        """Return what reads the calls of one text."""
        return ToolCallParser(self.call_format, self.tool_names, parallel=self.is_parallel)


def resolve_tool_calling(
    body: ChatCompletionRequest, codec: ModelTokenizer
) -> ToolCallConfig | None:
    """Return how a chat's tools are called; None if they are not to be.

    Raises:
        ApiError: they cannot be with this model, or not together with something else.
    """
    tool_choice = body.effective_tool_choice
    if not body.tools or tool_choice.mode == "none":
        return None
    if not supports_tools(codec.tool_chat_template):
        raise unsupported_param("tools", "is not supported by this model's chat template")
    call_format = detect_format(codec.tool_chat_template)
    if call_format is None and tool_choice.mode == "auto":
        raise unsupported_param(
            "tools",
            "is supported with this model's chat template for 'tool_choice' required or a function "
            "only",
        )
    is_parallel = tool_choice.mode != "named" and body.parallel_tool_calls is not False
    call_format = call_format or HERMES
    return ToolCallConfig(
        call_format=call_format,
        template_tools=tuple(tool.to_template() for tool in body.tools),
        tool_names=frozenset(tool.function.name for tool in body.tools),
        choice_mode=tool_choice.mode,
        is_parallel=is_parallel,
        grammar=_tool_call_grammar(body, codec, call_format, is_parallel=is_parallel),
    )


def _tool_call_grammar(
    body: ChatCompletionRequest,
    codec: ModelTokenizer,
    call_format: ToolCallFormat,
    *,
    is_parallel: bool,
) -> GrammarSource | None:
    fallback_schema = None
    if body.effective_tool_choice.mode == "auto":
        fallback_schema = _schema_text(body.response_format)
        if fallback_schema is None:
            return None
    elif body.resolved_structured_output is not None and body.response_format is None:
        raise ApiError(
            f"Invalid value for '{body.resolved_structured_output.param}': not allowed together with 'tool_choice'.",
            param=body.resolved_structured_output.param,
            code="invalid_value",
        )

    def token_literal(text: str) -> str:
        return _special_token_literal(text, codec)

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


def _special_token_literal(text: str, codec: ModelTokenizer) -> str:
    token = codec.special_token_id(text)
    return f'"{text}"' if token is None else f"<[{token}]>"


def _schema_text(constraint: StructuredOutput | None) -> str | None:
    return None if constraint is None else constraint.grammar.text
