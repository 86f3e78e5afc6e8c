"""What answers look like, for the app's OpenAPI. They are built by hand, without these models.

The app's OpenAPI: each route says what it answers, errors included, as clients will see it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

NonNegativeInt = Annotated[int, Field(ge=0)]
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


class ErrorResponse(BaseModel):
    """An error, as OpenAI's API tells it."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """What kinds of tokens prompts had."""

    audio_tokens: NonNegativeInt
    cached_tokens: Annotated[
        int, Field(ge=0, description="Tokens that the tenant's own earlier prompts left cached.")
    ]


class CompletionTokensDetails(BaseModel):
    """What kinds of tokens were generated."""

    accepted_prediction_tokens: NonNegativeInt
    audio_tokens: NonNegativeInt
    reasoning_tokens: NonNegativeInt
    rejected_prediction_tokens: NonNegativeInt


class UsageInfo(BaseModel):
    """The tokens of one request."""

    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt
    total_tokens: NonNegativeInt
    prompt_tokens_details: PromptTokensDetails | None
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatCompletionLogprobs(BaseModel):
    """The log-probabilities of a message."""

    content: list[ChatTokenLogprob]
    refusal: None


class FunctionCall(BaseModel):
    """A function that is called."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the assistant makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ResponseMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatCompletionChoice(BaseModel):
    """One answer of several."""

    index: NonNegativeInt
    message: ResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason


class _CompletionResponseBase(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    service_tier: Literal["default"] | None = None
    usage: UsageInfo


class ChatCompletionResponse(_CompletionResponseBase):
    """The continuation of a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatCompletionChoice]


class CompletionLogprobs(BaseModel):
    """The log-probabilities of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text of several."""

    index: NonNegativeInt
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason


class CompletionResponse(_CompletionResponseBase):
    """The continuation of texts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


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


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    count: NonNegativeInt
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """The text of tokens."""

    prompt: str


class TenantUsageResponse(BaseModel):
    """What a tenant has used."""

    object: Literal["usage"]
    tenant: str
    since: int
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt
    total_tokens: NonNegativeInt
    requests: dict[str, int]
    expert_seconds: float
    expert_gb_seconds: float
    router_replicas: int
    others_as_of: Annotated[
        int | None,
        Field(description="When usage was last received from other routers; null if never."),
    ]


class HealthResponse(BaseModel):
    """That all is well."""

    status: Literal["ok"]


class VersionResponse(BaseModel):
    """The version of FaaSMoE."""

    version: str


RouteResponses = dict[int | str, dict[str, Any]]


_STATUS_DESCRIPTIONS: Mapping[int, str] = {
    400: "Invalid request or unsupported parameter; `param` names it.",
    401: "The API key is missing or invalid.",
    404: "There is no such model, account or path.",
    413: "The body is too large.",
    429: "The tenant's rate limit is exceeded, or the queue is full.",
    500: "Internal server error.",
    501: "Not implemented by this server.",
    503: "Service unavailable: starting, shutting down, or functions not activated in time.",
}
_RETRY_AFTER_HEADER = {
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}
}
_UNAUTHENTICATED_PATHS = ("/health", "/ping", "/version", "/metrics")
_ERROR_SCHEMA_REF = {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"}
_API_KEY_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "One of the tenant's API keys.",
}


def error_responses(*statuses: int) -> RouteResponses:
    """Return these errors as a route's responses."""
    return {status: _error_response(status) for status in statuses}


def json_responses(
    response_model: type[BaseModel], *statuses: int, is_streamable: bool = False
) -> RouteResponses:
    """Return a route's responses: what it answers with if all is well, and these errors.

    Args:
        response_model: the model of the response.
        statuses: the errors' statuses.
        is_streamable: whether the response may be a stream of events instead.
    """
    event_stream = {"text/event-stream": {"schema": {"type": "string"}}}
    success: dict[str, Any] = {
        "model": response_model,
        **({"content": event_stream} if is_streamable else {}),
    }
    return {200: success, **error_responses(*statuses)}


def text_error_responses(*statuses: int) -> RouteResponses:
    """Return these errors as the responses of a route that answers with text if all is well."""
    content = {"application/json": {"schema": _ERROR_SCHEMA_REF}}
    return {
        status: {"description": _STATUS_DESCRIPTIONS[status], "content": content}
        for status in statuses
    }


def install_openapi(app: FastAPI, *, requires_api_key: bool) -> None:
    """Let the app's OpenAPI say what is answered.

    Args:
        app: the app, all of its routes included.
        requires_api_key: whether requests need a key.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build_schema(app, requires_api_key=requires_api_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _build_schema(app: FastAPI, *, requires_api_key: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            # FastAPI's own answer to a body of the wrong shape; ours is a 400.
            operation["responses"].pop("422", None)
            if requires_api_key and path not in _UNAUTHENTICATED_PATHS:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = text_error_responses(401)[401]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if requires_api_key:
        schema["components"]["securitySchemes"] = {"key": _API_KEY_SCHEME}
    return schema


def _error_response(status: int) -> dict[str, Any]:
    headers = {"headers": _RETRY_AFTER_HEADER} if status in (429, 503) else {}
    return {"model": ErrorResponse, "description": _STATUS_DESCRIPTIONS[status], **headers}
