"""What answers look like, for the app's OpenAPI. They are built by hand, without these models."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Count = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "tool_calls"]
StopReason = Annotated[
    str | int | None,
    Field(description="The stop string or stop token of the request that ended the text, if any."),
]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error, as OpenAI's API tells it."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    """What kinds of tokens prompts had."""

    audio_tokens: Count
    cached_tokens: Annotated[
        int, Field(ge=0, description="Tokens that the tenant's own earlier prompts left cached.")
    ]


class CompletionDetails(BaseModel):
    """What kinds of tokens were generated."""

    accepted_prediction_tokens: Count
    audio_tokens: Count
    reasoning_tokens: Count
    rejected_prediction_tokens: Count


class Usage(BaseModel):
    """The tokens of one request."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails | None
    completion_tokens_details: CompletionDetails


class TopLogprob(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of a message."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """A function that is called."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the assistant makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer of several."""

    index: Count
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason


class _Completion(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    service_tier: Literal["default"] | None = None
    usage: Usage


class ChatCompletion(_Completion):
    """The continuation of a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    """The log-probabilities of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text of several."""

    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason


class TextCompletion(_Completion):
    """The continuation of texts."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(BaseModel):
    """The model, by one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    """The names that the caller may call the model."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenList(BaseModel):
    """The tokens of a text."""

    count: Count
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenText(BaseModel):
    """The text of tokens."""

    prompt: str


class AccountUsage(BaseModel):
    """What a tenant has used."""

    object: Literal["usage"]
    tenant: str
    since: int
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    requests: dict[str, int]
    expert_seconds: float
    expert_gb_seconds: float
    router_replicas: int
    others_as_of: Annotated[
        int | None,
        Field(description="When use through other routers was heard of last; null if never."),
    ]


class Status(BaseModel):
    """That all is well."""

    status: Literal["ok"]


class Version(BaseModel):
    """The version of FaaSMoE."""

    version: str


Responses = dict[int | str, dict[str, Any]]
