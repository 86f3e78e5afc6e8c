"""The app's OpenAPI schema: response models and error responses.

The models only document responses, which the routes build as plain dicts. The schema lists each
route's errors in OpenAI's shape and drops FastAPI's own 422.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from faasmoe_router.api.documented_routes import documented_routes

# For probes. Only /v1 and /{tenant}/v1 are exposed to tenants.
UNAUTHENTICATED_PATHS = frozenset({"/health", "/ping", "/load", "/version"})

NonNegativeInt = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "tool_calls"]
StopReason = Annotated[
    str | int | None,
    Field(description="The request's stop string or stop token that ended the text, if any."),
]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """A breakdown of the prompt tokens."""

    audio_tokens: NonNegativeInt
    cached_tokens: Annotated[
        int, Field(ge=0, description="Tokens cached from earlier prompts of the same tenant.")
    ]
    cache_write_tokens: Annotated[
        int, Field(ge=0, description="Tokens that later prompts of the same tenant find cached.")
    ]


class CompletionTokensDetails(BaseModel):
    """A breakdown of the generated tokens."""

    accepted_prediction_tokens: NonNegativeInt
    audio_tokens: NonNegativeInt
    reasoning_tokens: NonNegativeInt
    rejected_prediction_tokens: NonNegativeInt


class UsageInfo(BaseModel):
    """The token counts of one request."""

    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt
    total_tokens: NonNegativeInt
    prompt_tokens_details: PromptTokensDetails | None
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    """A candidate token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The sampled token and the likeliest candidates."""

    top_logprobs: list[TopLogprob]


class ChatCompletionLogprobs(BaseModel):
    """The log-probabilities of a message's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class FunctionCall(BaseModel):
    """The function of a tool call; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A tool call by the assistant."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class CustomCall(BaseModel):
    """The custom tool of a call; `input` is free text."""

    name: str
    input: str


class CustomToolCall(BaseModel):
    """A call of a custom tool by the assistant."""

    id: str
    type: Literal["custom"]
    custom: CustomCall


class ResponseMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall | CustomToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class PromptLogprob(BaseModel):
    """One candidate at a position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None] | None


class ChatCompletionChoice(BaseModel):
    """One choice of a chat completion."""

    index: NonNegativeInt
    message: ResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: list[int] | None


class _CompletionResponseBase(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    service_tier: Literal["default"] | None = None
    usage: UsageInfo


class ChatCompletionResponse(_CompletionResponseBase):
    """The response of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatCompletionChoice]
    prompt_logprobs: PromptLogprobs
    prompt_token_ids: list[int] | None


class CompletionLogprobs(BaseModel):
    """The log-probabilities of a text's tokens, in OpenAI's legacy form."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One choice of a text completion."""

    index: NonNegativeInt
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs
    prompt_token_ids: list[int] | None


class CompletionResponse(_CompletionResponseBase):
    """The response of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ResponseObject(BaseModel):
    """The response of POST /v1/responses."""

    id: str
    object: Literal["response"]
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    output: list[dict[str, Any]]


class MessageResponse(BaseModel):
    """The response of POST /v1/messages, in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: dict[str, int]


class CountTokensResponse(BaseModel):
    """The response of POST /v1/messages/count_tokens."""

    input_tokens: NonNegativeInt


class ModelCard(BaseModel):
    """The model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    """The model under each name that the caller may use."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    count: NonNegativeInt
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """The text of a list of tokens."""

    prompt: str


class TenantUsageResponse(BaseModel):
    """The usage of a tenant since a point in time, in seconds since the epoch."""

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
    """The server is healthy."""

    status: Literal["ok"]


class LoadResponse(BaseModel):
    """The load of this router."""

    server_load: NonNegativeInt


class VersionResponse(BaseModel):
    """The version of FaaSMoE."""

    version: str


RouteResponses = dict[int | str, dict[str, Any]]

_STATUS_DESCRIPTIONS: Mapping[int, str] = {
    400: "Invalid request or unsupported parameter; `param` names it.",
    401: "The API key is missing or invalid.",
    404: "No such model, usage record or path.",
    413: "The request body is too large.",
    429: "The tenant's rate limit is exceeded, or the queue is full.",
    500: "Internal server error.",
    501: "Not implemented by this server.",
    503: "Service unavailable: starting, shutting down, or functions not activated in time.",
}
_RETRY_AFTER_HEADER = {
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}
}
_SCHEMA_REF = "#/components/schemas/{model}"
_ERROR_SCHEMA_REF = {"$ref": _SCHEMA_REF.format(model=ErrorResponse.__name__)}
_API_KEY_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "One of the tenant's API keys.",
}


def error_responses(*statuses: int) -> RouteResponses:
    """Return the documentation of error statuses, for a route's `responses`."""
    return {status: _error_response(status) for status in statuses}


def json_responses(
    response_model: type[BaseModel], *statuses: int, is_streamable: bool = False
) -> RouteResponses:
    """Return the `responses` of a route that returns JSON.

    Args:
        response_model: the model of the 200 response.
        statuses: the possible error statuses.
        is_streamable: whether the 200 response may be a stream of server-sent events instead.
    """
    event_stream = {"text/event-stream": {"schema": {"type": "string"}}}
    success: dict[str, Any] = {
        "model": response_model,
        **({"content": event_stream} if is_streamable else {}),
    }
    return {200: success, **error_responses(*statuses)}


_request_models: dict[str, type[BaseModel]] = {}


def json_request_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads its body as a model by itself."""
    _request_models[model.__name__] = model
    schema = {"$ref": _SCHEMA_REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def text_error_responses(*statuses: int) -> RouteResponses:
    """Return the error `responses` of a route whose 200 response is plain text.

    FastAPI documents a model under the route's own media type, so the schema is referenced
    explicitly as JSON.
    """
    content = {"application/json": {"schema": _ERROR_SCHEMA_REF}}
    return {
        status: {"description": _STATUS_DESCRIPTIONS[status], "content": content}
        for status in statuses
    }


def install_openapi(app: FastAPI, *, requires_api_key: bool) -> None:
    """Replace the app's OpenAPI schema with one that documents this module's responses.

    Args:
        app: the app, with all of its routes.
        requires_api_key: whether routes outside `UNAUTHENTICATED_PATHS` need an API key.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build_schema(app, requires_api_key=requires_api_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _build_schema(app: FastAPI, *, requires_api_key: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=documented_routes(app.routes))
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            # FastAPI's validation error; this app answers 400 instead.
            operation["responses"].pop("422", None)
            if requires_api_key and path not in UNAUTHENTICATED_PATHS:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = text_error_responses(401)[401]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    schema["components"]["schemas"].update(_request_schemas())
    if requires_api_key:
        schema["components"]["securitySchemes"] = {"key": _API_KEY_SCHEME}
    return schema


def _request_schemas() -> dict[str, Any]:
    models = [(model, "validation") for model in _request_models.values()]
    _, definitions = models_json_schema(models, ref_template=_SCHEMA_REF)  # type: ignore[arg-type]
    return dict(definitions["$defs"])


def _error_response(status: int) -> dict[str, Any]:
    headers = {"headers": _RETRY_AFTER_HEADER} if status in (429, 503) else {}
    return {"model": ErrorResponse, "description": _STATUS_DESCRIPTIONS[status], **headers}
