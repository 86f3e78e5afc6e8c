"""The tools of a request: what may be called, and what is to be.

The messages of a conversation, and what a chat template takes of them.

The bodies of requests, as strict as OpenAI's: a bool is no number and "1" is none either.

Parameters that are known but not honoured are refused when they ask for something; what is unknown
is ignored, as clients send it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from faasmoe_router.api import validation
from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.structured_outputs import (
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    ResponseFormat,
    StructuredOutput,
    StructuredOutputs,
    dump_json,
)
from faasmoe_router.api.validation import (
    UNSUPPORTED_MESSAGE_PARAMS,
    BadWords,
    BoundedTokenIds,
    LogitBias,
    MessageContent,
    Prompts,
    StopStrings,
    Text,
    field_error,
    reject_unsupported,
)
from faasmoe_router.engine.sampler import MAX_TOP_LOGPROBS

MAX_TOOLS = 128
FUNCTION_NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"


class _ToolModel(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


def _parse_function_parameters(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {"type": "object", "properties": {}}
    if not isinstance(value, dict):
        raise field_error("type", "Input should be a JSON schema, an object")
    if value.get("type", "object") != "object":
        raise field_error("value", "Input should be a JSON schema of type object")
    dump_json(value)
    return value


FunctionParameters = Annotated[
    Mapping[str, Any],
    PlainValidator(_parse_function_parameters, json_schema_input_type=dict[str, Any] | None),
]


class FunctionDefinition(_ToolModel):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME_PATTERN)]
    description: Text | None = None
    parameters: FunctionParameters = Field(default_factory=lambda: _parse_function_parameters(None))
    strict: bool | None = None


class ToolParam(_ToolModel):
    """One tool of a request."""

    type: Literal["function"]
    function: FunctionDefinition

    def to_template(self) -> dict[str, Any]:
        """Return what a chat template takes."""
        function_schema = {"name": self.function.name, "parameters": self.function.parameters}
        if self.function.description is not None:
            function_schema = {
                "name": function_schema["name"],
                "description": self.function.description,
                **function_schema,
            }
        return {"type": "function", "function": function_schema}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are to be called.

    Attributes:
        mode: none, if the model likes, at least one, or the one that is named.
        name: the tool that is named.
    """

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def parse_tool_choice(value: Any) -> ToolChoice | None:
    """Read `tool_choice`: null, a mode, or an object that names a function."""
    if value is None:
        return None
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    expected = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
    if not isinstance(value, str | dict):
        raise field_error("type", f"Input should be {expected}")
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(name, str):
        raise field_error("value", f"Input should be {expected}")
    return ToolChoice("named", name)


ToolChoiceField = Annotated[
    ToolChoice | None,
    PlainValidator(parse_tool_choice, json_schema_input_type=str | dict[str, Any] | None),
]


class _MessageModel(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class FunctionCallParam(_MessageModel):
    """The function of a call that the assistant made."""

    name: Text
    arguments: Text


class ToolCallParam(_MessageModel):
    """A call that the assistant made."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCallParam

    def to_template(self, path: str) -> dict[str, Any]:
        """Return what a chat template takes: the arguments as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise _invalid_value(
                f"{path}.function.arguments", "expected a JSON object, written as text"
            )
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(_MessageModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: MessageContent = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: list[ToolCallParam] | None = None

    def to_template(self, path: str) -> dict[str, Any]:
        """Return what a chat template takes; raises ApiError that names the field."""
        reject_unsupported(self.model_extra, UNSUPPORTED_MESSAGE_PARAMS, path=f"{path}.")
        if self.tool_calls and self.role != "assistant":
            raise _invalid_value(f"{path}.tool_calls", "only allowed in assistant messages")
        if self.content is None and not self.tool_calls:
            raise self._missing_content(f"{path}.content")
        tool_calls = [
            call.to_template(f"{path}.tool_calls[{index}]")
            for index, call in enumerate(self.tool_calls or ())
        ]
        return {
            "role": self.role,
            "content": self.content or "",
            **({"name": self.name} if self.name is not None else {}),
            **({"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}),
            **({"tool_calls": tool_calls} if tool_calls else {}),
        }

    def _missing_content(self, path: str) -> ApiError:
        if "content" in self.model_fields_set:
            return _invalid_value(path, "expected a string, got null")
        return ApiError(
            f"Missing required parameter: '{path}'.",
            param=path,
            code="missing_required_parameter",
        )


def _invalid_value(param: str, expected: str) -> ApiError:
    return ApiError(f"Invalid value for '{param}': {expected}.", param=param, code="invalid_value")


INT64_MAX = 2**63 - 1
MAX_CHOICES = 128

Penalty = Annotated[float, Field(ge=-2, le=2)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_RequestModel):
    """How a stream is told."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionRequestBase(_RequestModel):
    """What both kinds of completion take."""

    unsupported_parameters: ClassVar[Mapping[str, tuple[Any, ...]]]

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
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
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """The most tokens to generate, after the parameter that says so, if one does."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @property
    def extra_response_fields(self) -> dict[str, str]:
        """What the answer repeats of the request: the tier that serves it, if one was asked for."""
        service_tier = (self.model_extra or {}).get("service_tier")
        return {} if service_tier is None else {"service_tier": "default"}

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells nothing."""
        return None

    @property
    def resolved_structured_output(self) -> StructuredOutput | None:
        """What the text is held to, if it is; raises ApiError if by two parameters."""
        candidates = [
            *(self.response_format, self.structured_outputs),
            *(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
        ]
        given = [constraint for constraint in candidates if constraint is not None]
        if len(given) > 1:
            raise _invalid_param(given[1].param, f"not allowed together with {given[0].param}")
        return given[0] if given else None

    def check_params(self) -> None:
        """Refuse what is asked for but not honoured; raises ApiError that names it."""
        validation.reject_unsupported(self.model_extra, self.unsupported_parameters)
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "The 'stream_options' parameter is only allowed when 'stream' is true.",
                param="stream_options",
                code="invalid_value",
            )


class ChatCompletionRequest(CompletionRequestBase):
    """POST /v1/chat/completions."""

    unsupported_parameters = validation.UNSUPPORTED_CHAT_PARAMS

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """The most tokens to generate, after its parameter; the newer parameter wins."""
        if self.max_completion_tokens is None:
            return super().token_limit
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def effective_tool_choice(self) -> ToolChoice:
        """Whether tools are to be called."""
        return self.tool_choice or ToolChoice("auto" if self.tools else "none")

    def check_params(self) -> None:
        """Refuse what is asked for but not honoured, or does not go together."""
        super().check_params()
        if self.top_logprobs and not self.logprobs:
            raise _invalid_param("top_logprobs", "requires 'logprobs' to be true")
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise _invalid_param(
                "continue_final_message", "requires 'add_generation_prompt' to be false"
            )
        tool_names = [tool.function.name for tool in self.tools or ()]
        tool_choice = self.effective_tool_choice
        if tool_choice.mode in ("required", "named") and not tool_names:
            raise _invalid_param("tool_choice", "requires 'tools'")
        if tool_choice.mode == "named" and tool_choice.name not in tool_names:
            raise _invalid_param("tool_choice", "expected the name of one of the 'tools'")
        if len(set(tool_names)) < len(tool_names):
            raise _invalid_param("tools", "function names must be unique")


class CompletionRequest(CompletionRequestBase):
    """POST /v1/completions."""

    unsupported_parameters = validation.UNSUPPORTED_COMPLETION_PARAMS

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells nothing."""
        return self.logprobs

    def check_params(self) -> None:
        """Refuse what is asked for but not honoured, or does not go together."""
        super().check_params()
        if self.best_of not in (None, self.n or 1):
            raise validation.unsupported_param("best_of", "is supported by this server as n only")
        if self.echo and self.logprobs is not None:
            raise validation.unsupported_param(
                "logprobs", "is not supported by this server together with 'echo'"
            )


def _invalid_param(param: str, reason: str) -> ApiError:
    return ApiError(f"Invalid value for '{param}': {reason}.", param=param, code="invalid_value")
