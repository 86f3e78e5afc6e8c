"""The request bodies of chat completions and text completions.

Validation is as strict as OpenAI's: a bool is not a number, and neither is "1". Fields that a model
does not declare but knows as unsupported are kept in `model_extra` and rejected by `check_params`;
unknown ones are dropped, so that they take no memory. Nothing here depends on the served model:
checks that need its tokenizer or context length are in `preprocessing`.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

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
    is_json,
)
from faasmoe_router.api.tool_params import ToolCallParam, ToolChoice, ToolChoiceField, ToolParam
from faasmoe_router.api.validation import (
    MAX_MESSAGES,
    MAX_TOOL_CALLS,
    UNSUPPORTED_CHAT_PARAMS,
    UNSUPPORTED_COMPLETION_PARAMS,
    UNSUPPORTED_MESSAGE_PARAMS,
    BadWords,
    BoundedTokenIds,
    CacheSalt,
    LogitBias,
    MessageContent,
    Prompts,
    RequestModel,
    StopStrings,
    Text,
    reject_unsupported,
)
from faasmoe_router.engine.sampler import MAX_TOP_LOGPROBS

MAX_TOOLS = 128
MAX_CHOICES = 128
DEFAULT_COMPLETION_TOKENS = 16
INT64_MAX = 2**63 - 1
REQUEST_ID_PATTERN = r"^[A-Za-z0-9_.:/+=-]{1,128}$"

Penalty = Annotated[float, Field(ge=-2, le=2)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# Chat templates may know roles beside OpenAI's; no role can have marks of a template.
Role = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


class ChatMessage(RequestModel):
    """One message of a conversation."""

    unsupported_parameters = UNSUPPORTED_MESSAGE_PARAMS
    keeps_unknown = True  # the chat template may know them

    role: Role
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
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    logprob_token_ids: BoundedTokenIds = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    request_id: Annotated[str, Field(pattern=REQUEST_ID_PATTERN)] | None = None
    cache_salt: CacheSalt | None = None
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
    echo: bool | None = None
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
    def n_reported_logprobs(self) -> int | None:
        """How many of the computed candidates to report per token; None reports all."""
        return None if self.logprob_token_ids else self.n_logprobs

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
        if self.max_tokens == 0 and not (self.scores_prompt or self.echo):
            raise invalid_value("max_tokens", "expected at least 1 without 'echo', got 0")
        if self.logprob_token_ids and (self.n_logprobs is None or self.scores_prompt):
            raise invalid_value(
                "logprob_token_ids", "requires 'logprobs', without those of the prompt"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise unsupported_param("prompt_logprobs", "is not supported together with 'stream'")
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "The 'stream_options' parameter is only allowed when 'stream' is true.",
                param="stream_options",
                code="invalid_value",
            )


CHAT_EXTENSIONS = (
    *("allowed_token_ids", "bad_words", "cache_salt", "chat_template_kwargs", "ebnf"),
    *("frequency_penalty", "grammar", "guided_choice", "guided_grammar", "guided_json"),
    *("guided_regex", "ignore_eos", "include_stop_str_in_output", "json_schema", "logit_bias"),
    *("min_p", "min_tokens", "presence_penalty", "priority", "regex", "repetition_penalty"),
    *("seed", "skip_special_tokens", "stop_token_ids", "structured_outputs"),
)
"""Parameters that other APIs do not have, and that mean there what they mean in a chat."""


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
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
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
    def echoed_text(self) -> str:
        """The last message if it is to precede the answer: as in vLLM, an assistant's."""
        last = self.messages[-1]
        return (last.content or "") if self.echo and last.role == "assistant" else ""

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
        if self.best_of not in (None, self.n or 1):
            raise unsupported_param("best_of", "is only supported when it equals 'n'")
