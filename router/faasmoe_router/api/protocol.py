"""The request bodies of chat completions and text completions.

Validation is as strict as OpenAI's: a bool is not a number, and neither is "1". Fields that a model
does not declare but knows as unsupported are kept in `model_extra` and rejected by `check_params`;
unknown ones are dropped, so that they take no memory. Nothing here depends on the served model:
checks that need its tokenizer or context length are in `preprocessing`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from faasmoe_router.api.errors import ApiError, invalid_value, missing_param, unsupported_param
from faasmoe_router.api.structured_outputs import (
    Ebnf,
    Grammar,
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    JsonSchema,
    Regex,
    ResponseFormat,
    StructuredOutput,
    StructuredOutputs,
    dump_json,
    is_json,
)
from faasmoe_router.api.validation import (
    MAX_MESSAGES,
    MAX_TOOL_CALLS,
    UNSUPPORTED_CHAT_PARAMS,
    UNSUPPORTED_COMPLETION_PARAMS,
    UNSUPPORTED_MESSAGE_PARAMS,
    BadWords,
    BoundedTokenIds,
    LogitBias,
    MessageContent,
    Prompts,
    StopStrings,
    Text,
    field_error,
    is_valid_text,
    reject_unsupported,
)
from faasmoe_router.engine.sampler import MAX_TOP_LOGPROBS

MAX_TOOLS = 128
MAX_CHOICES = 128
DEFAULT_COMPLETION_TOKENS = 16
INT64_MAX = 2**63 - 1
CUSTOM_TOOL_INPUT = "input"
REQUEST_ID_PATTERN = r"^[A-Za-z0-9_.:/+=-]{1,128}$"
FUNCTION_NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"

Penalty = Annotated[float, Field(ge=-2, le=2)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


class RequestModel(BaseModel):
    """Base of all request models: strict types, finite numbers, unknown fields are dropped.

    Attributes:
        unsupported_parameters: undeclared fields that are known, each with its neutral values.
        known_extra: other undeclared fields that are known.
        keeps_unknown: whether unknown fields are kept, because something may know them.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    unsupported_parameters: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    known_extra: ClassVar[frozenset[str]] = frozenset()
    keeps_unknown: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, value: Any) -> Any:
        if not isinstance(value, dict) or cls.keeps_unknown:
            return value
        known = cls.model_fields.keys() | cls.unsupported_parameters.keys() | cls.known_extra
        return {name: value[name] for name in value if name in known}


_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def _parse_function_parameters(value: Any) -> Mapping[str, Any]:
    if value is None:
        return _NO_PARAMETERS
    if not isinstance(value, dict):
        raise field_error("type", "Input should be a JSON schema, an object")
    if value.get("type", "object") != "object":
        raise field_error("value", "Input should be a JSON schema of type object")
    dump_json(value)  # rejects what JSON cannot represent
    return value


FunctionParameters = Annotated[
    Mapping[str, Any],
    PlainValidator(_parse_function_parameters, json_schema_input_type=dict[str, Any] | None),
]


class FunctionDefinition(RequestModel):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME_PATTERN)]
    description: Text | None = None
    parameters: FunctionParameters = Field(default_factory=lambda: _parse_function_parameters(None))
    strict: bool | None = None


def _custom_as_function(value: Any) -> Any:
    """Return a custom tool as a function with one text, `input`; other values unchanged."""
    if not isinstance(value, dict) or value.get("type") != "custom" or "function" in value:
        return value
    custom = value.get("custom")
    if not isinstance(custom, dict):
        raise field_error("type", "Input should have an object 'custom'")
    text_format = custom.get("format") or {"type": "text"}
    if not isinstance(text_format, dict) or text_format.get("type") != "text":
        raise field_error(
            "value", "custom.format should be of type text; grammars are not supported here"
        )
    function = {name: custom[name] for name in ("name", "description") if name in custom}
    return {"type": "custom", "function": {**function, "parameters": _CUSTOM_TOOL_PARAMETERS}}


_CUSTOM_TOOL_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {CUSTOM_TOOL_INPUT: {"type": "string"}},
    "required": [CUSTOM_TOOL_INPUT],
    "additionalProperties": False,
}


class ToolParam(RequestModel):
    """A tool that the model may call; a custom tool is a function whose argument is one text."""

    type: Literal["function", "custom"]
    function: FunctionDefinition

    _translate_custom = model_validator(mode="before")(_custom_as_function)

    def to_template(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it: name, description, parameters.

        Templates read all three, and the parameters' properties, without asking whether they exist.
        """
        function_schema = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": {**_NO_PARAMETERS, **self.function.parameters},
        }
        return {"type": "function", "function": function_schema}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may or must call tools.

    Attributes:
        mode: `none`: it may not; `auto`: it decides; `required`: at least one; `named`: `name`.
        name: the tool to call in mode `named`, else None.
        allowed: names of the only tools that may be called; None allows all.
    """

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None
    allowed: frozenset[str] | None = None

    @property
    def named_tools(self) -> frozenset[str]:
        """Names of the tools that it refers to."""
        return frozenset(() if self.name is None else (self.name,)) | (self.allowed or frozenset())


def parse_tool_choice(value: Any) -> ToolChoice | None:
    """Parse `tool_choice`: null, a mode, or an object that names a tool or the allowed tools."""
    if value is None:
        return None
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    expected = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
    if not isinstance(value, str | dict):
        raise field_error("type", f"Input should be {expected}")
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _parse_allowed_tools(value.get("allowed_tools"))
    name = _tool_name(value)
    if name is None:
        raise field_error("value", f"Input should be {expected}")
    return ToolChoice("named", name)


def _tool_name(value: Any) -> str | None:
    """Return the name in a reference to a tool; None if it is not one."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("function", "custom"):
        return None
    tool = value.get(kind)
    name = tool.get("name") if isinstance(tool, dict) else None
    return name if isinstance(name, str) else None


def _parse_allowed_tools(value: Any) -> ToolChoice:
    mode = value.get("mode") if isinstance(value, dict) else None
    tools = value.get("tools") if isinstance(value, dict) else None
    names = [_tool_name(tool) for tool in tools] if isinstance(tools, list) else []
    if mode not in ("auto", "required") or not names or None in names:
        raise field_error(
            "value", "allowed_tools should have a mode, auto or required, and a list of tools"
        )
    return ToolChoice(mode, allowed=frozenset(name for name in names if name is not None))


ToolChoiceField = Annotated[
    ToolChoice | None,
    PlainValidator(parse_tool_choice, json_schema_input_type=str | dict[str, Any] | None),
]


def _parse_call_arguments(value: Any) -> Mapping[str, Any]:
    """Parse the arguments of an earlier call, an object or its JSON text.

    A call that `max_tokens` cut short, or that the model got wrong, has arguments that are not a
    JSON object. The conversation goes on, as in vLLM, with none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
            dump_json(value)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}
    if value is None or isinstance(value, list):
        return {}
    if not isinstance(value, dict):
        raise field_error("type", "Input should be a JSON object, or a string that contains one")
    dump_json(value)
    return value


CallArguments = Annotated[
    Mapping[str, Any],
    PlainValidator(_parse_call_arguments, json_schema_input_type=str | dict[str, Any] | None),
]


class FunctionCallParam(RequestModel):
    """The function of an earlier tool call."""

    name: Text
    arguments: CallArguments = Field(default_factory=dict)


def _custom_call_as_function(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("type") != "custom" or "custom" not in value:
        return value
    custom = value["custom"]
    if not isinstance(custom, dict) or not is_valid_text(custom.get("input")):
        raise field_error("type", "custom should be an object with a name and an input")
    arguments = {CUSTOM_TOOL_INPUT: custom["input"]}
    function = {"name": custom.get("name"), "arguments": arguments}
    return {**value, "type": "function", "function": function}


class ToolCallParam(RequestModel):
    """An earlier tool call by the assistant."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCallParam

    _translate_custom = model_validator(mode="before")(_custom_call_as_function)

    def to_template(self) -> dict[str, Any]:
        """Return the call as chat templates expect it: its arguments as an object."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(RequestModel):
    """One message of a conversation."""

    unsupported_parameters = UNSUPPORTED_MESSAGE_PARAMS
    keeps_unknown = True  # the chat template may know them

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: MessageContent = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: (
        Annotated[list[ToolCallParam], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None
    ) = None

    def to_template(self, path: str) -> dict[str, Any]:
        """Return the message as chat templates expect it.

        Args:
            path: the message's path in the request, such as `messages[0]`, for errors.

        Raises:
            ApiError: a field is unsupported, missing or not allowed for the role.
        """
        reject_unsupported(self.model_extra, UNSUPPORTED_MESSAGE_PARAMS, path=f"{path}.")
        if self.tool_calls and self.role != "assistant":
            raise invalid_value(f"{path}.tool_calls", "only allowed in assistant messages")
        if self.content is None and not self.tool_calls:
            raise self._content_error(f"{path}.content")
        tool_calls = [call.to_template() for call in self.tool_calls or ()]
        return {
            **self._extra_fields(path),
            "role": self.role,
            "content": self.content or "",
            **({"name": self.name} if self.name is not None else {}),
            **({"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}),
            **({"tool_calls": tool_calls} if tool_calls else {}),
        }

    def _extra_fields(self, path: str) -> dict[str, Any]:
        """Return the fields that only a chat template may know; raises ApiError.

        Reasoning is passed under both of its names.
        """
        extra = {name: v for name, v in (self.model_extra or {}).items() if v is not None}
        for name, value in extra.items():
            if not is_json(value):
                raise invalid_value(f"{path}.{name}", "expected valid JSON")
        reasoning = extra.get("reasoning", extra.get("reasoning_content"))
        if reasoning is None:
            return extra
        return {**extra, "reasoning": reasoning, "reasoning_content": reasoning}

    def _content_error(self, path: str) -> ApiError:
        if "content" in self.model_fields_set:
            return invalid_value(path, "expected a string, got null")
        return missing_param(path)


# An error of one element ends the validation: thousands of invalid ones would take seconds.
Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]
Tools = Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True)]


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionRequestBase(RequestModel):
    """The parameters that chat completions and text completions share.

    Attributes:
        content_fields: the fields that only the prompt is made from.
    """

    content_fields: ClassVar[tuple[str, ...]] = ()

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    request_id: Annotated[str, Field(pattern=REQUEST_ID_PATTERN)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: UnitInterval | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: UnitInterval | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: LogitBias = ()
    allowed_token_ids: BoundedTokenIds = None
    bad_words: BadWords = ()
    stop: StopStrings = ()
    stop_token_ids: BoundedTokenIds = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    guided_json: GuidedJson = None
    guided_regex: GuidedRegex = None
    guided_choice: GuidedChoice = None
    guided_grammar: GuidedGrammar = None
    json_schema: JsonSchema = None
    regex: Regex = None
    ebnf: Ebnf = None
    grammar: Grammar = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def without_contents(self) -> Self:
        """Return this without what only the prompt needs, to be kept while it is answered."""
        return self.model_copy(update=dict.fromkeys(self.content_fields))

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """The parameter that limits the generated tokens and its value; None if none is set."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @property
    def default_max_tokens(self) -> int | None:
        """How many tokens a choice may have without a limit; None for the rest of the context."""
        return None

    @property
    def extra_response_fields(self) -> dict[str, str]:
        """Response fields that echo the request: the service tier, if the request names one."""
        service_tier = (self.model_extra or {}).get("service_tier")
        return {} if service_tier is None else {"service_tier": "default"}

    @property
    def n_logprobs(self) -> int | None:
        """How many candidates to report per token, beside it; None reports no logprobs."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are requested."""
        return self.prompt_logprobs is not None

    @property
    def n_computed_logprobs(self) -> int | None:
        """How many candidates to compute per token, of prompt and output; None computes none."""
        counts = [n for n in (self.n_logprobs, self.prompt_logprobs) if n is not None]
        return max(counts, default=None)

    @property
    def resolved_structured_output(self) -> StructuredOutput | None:
        """The constraint on the output, if any; raises ApiError if two parameters set one."""
        candidates = [
            *(self.response_format, self.structured_outputs),
            *(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
            *(self.json_schema, self.regex, self.ebnf, self.grammar),
        ]
        given = [constraint for constraint in candidates if constraint is not None]
        if len(given) > 1:
            raise invalid_value(given[1].param, f"not allowed together with {given[0].param}")
        return given[0] if given else None

    def check_params(self) -> None:
        """Check constraints between parameters.

        Raises:
            ApiError: a parameter is unsupported or does not go together with another.
        """
        reject_unsupported(self.model_extra, self.unsupported_parameters)
        if self.max_tokens == 0 and not self.scores_prompt and not getattr(self, "echo", False):
            raise invalid_value("max_tokens", "expected at least 1 without 'echo', got 0")
        if self.prompt_logprobs is not None and self.stream:
            raise unsupported_param("prompt_logprobs", "is not supported together with 'stream'")
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "The 'stream_options' parameter is only allowed when 'stream' is true.",
                param="stream_options",
                code="invalid_value",
            )


class ChatCompletionRequest(CompletionRequestBase):
    """The body of POST /v1/chat/completions."""

    unsupported_parameters = UNSUPPORTED_CHAT_PARAMS
    content_fields = ("messages", "tools", "chat_template_kwargs")

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """As in the base class; `max_completion_tokens` overrides `max_tokens`."""
        if self.max_completion_tokens is None:
            return super().token_limit
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def n_logprobs(self) -> int | None:
        """How many candidates to report per token, beside it; None reports no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def effective_tool_choice(self) -> ToolChoice:
        """The tool choice, by default `auto` with tools and `none` without."""
        return self.tool_choice or ToolChoice("auto" if self.tools else "none")

    def check_params(self) -> None:
        """Check constraints between parameters, including those of tools."""
        super().check_params()
        if self.top_logprobs and not self.logprobs:
            raise invalid_value("top_logprobs", "requires 'logprobs' to be true")
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise invalid_value(
                "continue_final_message", "requires 'add_generation_prompt' to be false"
            )
        tool_names = [tool.function.name for tool in self.tools or ()]
        tool_choice = self.effective_tool_choice
        if tool_choice.mode in ("required", "named") and not tool_names:
            raise invalid_value("tool_choice", "requires 'tools'")
        if not tool_choice.named_tools.issubset(tool_names):
            raise invalid_value("tool_choice", "expected names of the 'tools'")
        if len(set(tool_names)) < len(tool_names):
            raise invalid_value("tools", "function names must be unique")


class CompletionRequest(CompletionRequestBase):
    """The body of POST /v1/completions."""

    unsupported_parameters = UNSUPPORTED_COMPLETION_PARAMS
    content_fields = ("prompt",)

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are requested, also by `echo`."""
        return super().scores_prompt or (bool(self.echo) and self.logprobs is not None)

    @property
    def default_max_tokens(self) -> int:
        """16, as in OpenAI and vLLM."""
        return DEFAULT_COMPLETION_TOKENS

    @property
    def n_logprobs(self) -> int | None:
        """How many candidates to report per token, beside it; None reports no logprobs."""
        return self.logprobs

    def check_params(self) -> None:
        """Check constraints between parameters, including `best_of` and `echo`."""
        super().check_params()
        if self.stream and self.scores_prompt:
            raise unsupported_param("logprobs", "is not supported with 'echo' and 'stream'")
        if self.best_of not in (None, self.n or 1):
            raise unsupported_param("best_of", "is only supported when it equals 'n'")
