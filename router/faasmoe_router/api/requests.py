"""The bodies of requests, as strict as OpenAI's: a bool is no number and "1" is none either.

Parameters that are known but not honoured are refused when they ask for something; what is unknown
is ignored, as clients send it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from faasmoe_router.api import unsupported
from faasmoe_router.api.constraints import (
    Constraint,
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    ResponseFormat,
    StructuredOutputs,
)
from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.fields import BadWords, FewTokens, LogitBias, Prompts, Stops, Text
from faasmoe_router.api.messages import ChatMessage
from faasmoe_router.api.tools import MAX_TOOLS, ToolChoice, ToolChoiceField, ToolPart
from faasmoe_router.engine.logprobs import MAX_TOP_LOGPROBS

INT64_MAX = 2**63 - 1
MAX_CHOICES = 128

Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    """How a stream is told."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(_Body):
    """What both kinds of completion take."""

    unsupported_parameters: ClassVar[Mapping[str, tuple[Any, ...]]]

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: LogitBias = ()
    allowed_token_ids: FewTokens = None
    bad_words: BadWords = ()
    stop: Stops = ()
    stop_token_ids: FewTokens = None
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
    def told(self) -> dict[str, str]:
        """What the answer repeats of the request: the tier that serves it, if one was asked for."""
        asked = (self.model_extra or {}).get("service_tier")
        return {} if asked is None else {"service_tier": "default"}

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells nothing."""
        return None

    @property
    def constraint(self) -> Constraint | None:
        """What the text is held to, if it is; raises ApiError if by two parameters."""
        asked = [
            *(self.response_format, self.structured_outputs),
            *(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
        ]
        found = [constraint for constraint in asked if constraint is not None]
        if len(found) > 1:
            raise _invalid(found[1].param, f"expected none beside {found[0].param}")
        return found[0] if found else None

    def check(self) -> None:
        """Refuse what is asked for but not honoured; raises ApiError that names it."""
        unsupported.refuse(self.model_extra, self.unsupported_parameters)
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "The 'stream_options' parameter is only allowed when 'stream' is true.",
                param="stream_options",
                code="invalid_value",
            )


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    unsupported_parameters = unsupported.CHAT_PARAMETERS

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ToolPart], Field(max_length=MAX_TOOLS)] | None = None
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
    def choice_of_tools(self) -> ToolChoice:
        """Whether tools are to be called."""
        return self.tool_choice or ToolChoice("auto" if self.tools else "none")

    def check(self) -> None:
        """Refuse what is asked for but not honoured, or does not go together."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise _invalid("top_logprobs", "expected 'logprobs' to be true with it")
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise _invalid(
                "continue_final_message", "expected 'add_generation_prompt' to be false with it"
            )
        names = [tool.function.name for tool in self.tools or ()]
        choice = self.choice_of_tools
        if choice.mode in ("required", "named") and not names:
            raise _invalid("tool_choice", "expected 'tools' with it")
        if choice.mode == "named" and choice.name not in names:
            raise _invalid("tool_choice", "expected the name of one of the 'tools'")
        if len(set(names)) < len(names):
            raise _invalid("tools", "expected different names")


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    unsupported_parameters = unsupported.COMPLETION_PARAMETERS

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells nothing."""
        return self.logprobs

    def check(self) -> None:
        """Refuse what is asked for but not honoured, or does not go together."""
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise unsupported.unsupported("best_of", "is supported by this server as n only")
        if self.echo and self.logprobs is not None:
            raise unsupported.unsupported(
                "logprobs", "is not supported by this server together with 'echo'"
            )


def _invalid(param: str, why: str) -> ApiError:
    return ApiError(f"Invalid value for '{param}': {why}.", param=param, code="invalid_value")
