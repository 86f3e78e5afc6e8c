"""Tool calling of one chat request: the call format, the grammar and the parser of its output.

The format in which the model writes calls is detected from its chat template. A grammar enforces
calls where `tool_choice` demands them. The formats, grammars and parsers themselves are in
`faasmoe_router.toolcalls`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from faasmoe_router.api.errors import invalid_value
from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.api.structured_outputs import dump_json
from faasmoe_router.api.tool_params import ToolChoice, ToolParam
from faasmoe_router.engine.structured_output import (
    JSON_OPTIONS,
    CompileRunner,
    GrammarCompiler,
    GrammarSource,
)
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import GrammarError
from faasmoe_router.toolcalls.blocks import BlockFormat, BlockToolCallParser, detect_block_format
from faasmoe_router.toolcalls.formats import HERMES, ToolCallFormat, detect_format, supports_tools
from faasmoe_router.toolcalls.grammar import ToolSpec, tool_call_grammar
from faasmoe_router.toolcalls.harmony import CHANNEL_MARKER
from faasmoe_router.toolcalls.message import CallParser
from faasmoe_router.toolcalls.parser import ToolCallParser
from faasmoe_router.toolcalls.pythonic import PythonicToolCallParser, is_pythonic
from faasmoe_router.toolcalls.schemas import weaker_schemas


@dataclass(frozen=True, slots=True)
class ToolCallConfig:
    """How the model calls tools in one chat.

    Attributes:
        call_format: the format in which the model writes calls, unless one of the next applies.
        block_format: the format with blocks in which it writes them; enforced calls have none.
        is_harmony: whether calls are messages of harmony.
        is_pythonic: whether calls are a Python list; enforced calls are not.
        is_prompted: whether the messages tell the model how to call, as its template does not.
        template_tools: the tools as the chat template expects them.
        callable_tools: the tools that it may call.
        custom_tools: names of the custom tools, whose only argument is a text.
        choice_mode: whether the model decides, must call some tool, or must call a named one.
        is_parallel: whether the model may make several calls.
        is_enforced: whether a grammar restricts the text to calls.
        fallback: JSON schema of a text that is allowed in place of enforced calls; None for none.
        token_literal: returns the Lark terminal of a marker of the format.
        notes: what of the tools' schemas is not enforced, for the client.
    """

    call_format: ToolCallFormat
    block_format: BlockFormat | None
    is_harmony: bool
    is_pythonic: bool
    is_prompted: bool
    template_tools: tuple[Mapping[str, Any], ...]
    callable_tools: tuple[ToolSpec, ...]
    custom_tools: frozenset[str]
    choice_mode: Literal["auto", "required", "named"]
    is_parallel: bool
    is_enforced: bool
    fallback: str | None
    token_literal: Callable[[str], str]
    notes: tuple[str, ...] = ()

    @property
    def tool_names(self) -> frozenset[str]:
        """Names of the tools that it may call."""
        return frozenset(tool.name for tool in self.callable_tools)

    @property
    def grammar(self) -> GrammarSource | None:
        """The grammar that constrains the text to calls; None if calls are not enforced."""
        if not self.is_enforced:
            return None
        text = tool_call_grammar(
            self.callable_tools,
            self.call_format,
            encode_marker=self.token_literal,
            json_options=JSON_OPTIONS,
            parallel=self.is_parallel,
            alternative_schema=self.fallback,
        )
        return GrammarSource("lark", text)

    @property
    def call_id_length(self) -> int:
        """Length in characters of the call ids that the chat template accepts."""
        return (self.block_format or self.call_format).call_id_length

    def new_parser(self) -> CallParser:
        """Return a parser for the calls in the text of one choice."""
        if self.is_pythonic:
            return PythonicToolCallParser(self.tool_names, parallel=self.is_parallel)
        if self.block_format is not None:
            schemas = {tool.name: tool.parameters for tool in self.callable_tools}
            return BlockToolCallParser(self.block_format, schemas, parallel=self.is_parallel)
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
    template = tokenizer.tool_chat_template
    block_format = detect_block_format(template) if supports_tools(template) else None
    call_format = None if block_format is not None else detect_format(template)
    is_harmony = CHANNEL_MARKER in template
    writes_python = is_pythonic(template)
    allowed = tool_choice.allowed
    tools = [tool for tool in body.tools if allowed is None or tool.function.name in allowed]
    is_enforced, fallback = _enforcement(body)

    def token_literal(text: str) -> str:
        token = tokenizer.special_token_id(text)
        return f'"{text}"' if token is None else f"<[{token}]>"

    return ToolCallConfig(
        call_format=call_format or HERMES,
        block_format=None if is_enforced else block_format,
        is_prompted=not (is_harmony or writes_python or block_format or call_format),
        is_harmony=is_harmony and not is_enforced,
        is_pythonic=writes_python and not is_enforced,
        template_tools=tuple(tool.to_template(template) for tool in tools),
        callable_tools=_callable_tools(tools, tool_choice),
        custom_tools=frozenset(t.function.name for t in tools if t.type == "custom"),
        choice_mode=tool_choice.mode,
        is_parallel=tool_choice.mode != "named" and body.parallel_tool_calls is not False,
        is_enforced=is_enforced,
        fallback=fallback,
        token_literal=token_literal,
    )


def _enforcement(body: ChatCompletionRequest) -> tuple[bool, str | None]:
    """Return whether calls are enforced, and the JSON schema of a text allowed in their place.

    With `tool_choice` auto and a `response_format`, the text is calls or else JSON of that format;
    without a format nothing is enforced. With required or named calls, no other constraint is
    allowed except a `response_format`, which calls take the place of.
    """
    if body.effective_tool_choice.mode == "auto":
        if body.response_format is None:
            return False, None
        return True, body.response_format.grammar.text
    structured_output = body.resolved_structured_output
    if structured_output is not None and body.response_format is None:
        raise invalid_value(structured_output.param, "not allowed together with 'tool_choice'")
    return True, None


def _callable_tools(tools: Sequence[ToolParam], tool_choice: ToolChoice) -> tuple[ToolSpec, ...]:
    functions = [tool.function for tool in tools]
    return tuple(
        ToolSpec(function.name, function.parameters, is_strict=function.strict is True)
        for function in functions
        if tool_choice.mode != "named" or function.name == tool_choice.name
    )


async def relax_tool_schemas(
    config: ToolCallConfig, compiler: GrammarCompiler, run: CompileRunner
) -> ToolCallConfig:
    """Return the config with schemas that a grammar can enforce, and notes of what it cannot.

    Tools with `strict: true` keep theirs; if it cannot be enforced, compiling it fails later.
    """
    if config.grammar is None or await _compiles(compiler, run, config.grammar) is None:
        return config
    tools, notes = [], []
    for tool in config.callable_tools:
        schema = GrammarSource("json_schema", dump_json(tool.schema))
        reason = None if tool.is_strict else await _compiles(compiler, run, schema)
        tools.append(tool if reason is None else await _relaxed(tool, compiler, run))
        if reason is not None:
            notes.append(f"tool {tool.name}: its schema is not enforced in full: {reason}")
    return replace(config, callable_tools=tuple(tools), notes=tuple(notes))


async def _compiles(
    compiler: GrammarCompiler, run: CompileRunner, source: GrammarSource
) -> str | None:
    """Return why a grammar does not compile; None if it does."""
    try:
        await compiler.compile(source, run)
    except GrammarError as error:
        return str(error)
    return None


async def _relaxed(tool: ToolSpec, compiler: GrammarCompiler, run: CompileRunner) -> ToolSpec:
    for schema in weaker_schemas(tool.schema):
        if (
            await _compiles(compiler, run, GrammarSource("lenient_json_schema", dump_json(schema)))
            is None
        ):
            return replace(tool, parameters=schema, is_lenient=True)
    return tool
