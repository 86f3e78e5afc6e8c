"""The routes of APIs that are translated onto chats: responses and messages."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from faasmoe_router.api.completions import ERROR_STATUSES, ChatService
from faasmoe_router.api.documented_routes import new_router
from faasmoe_router.api.errors import ApiError, from_validation_errors
from faasmoe_router.api.messages_endpoint import (
    CountTokensRequest,
    MessagesRendering,
    MessagesRequest,
)
from faasmoe_router.api.openapi import (
    CountTokensResponse,
    MessageResponse,
    ResponseObject,
    json_request_body,
    json_responses,
)
from faasmoe_router.api.origin import Origin
from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.api.rendering import Rendering
from faasmoe_router.api.responses_endpoint import ResponsesRendering, ResponsesRequest

# Names in these APIs of what chats call otherwise.
_RESPONSES_NAMES: Mapping[str, str] = {
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
_MESSAGES_NAMES: Mapping[str, str] = {"max_completion_tokens": "max_tokens"}


def translated_routes(chats: ChatService) -> APIRouter:
    """Return the routes of POST /v1/responses, /v1/messages and /v1/messages/count_tokens."""
    router = new_router()

    @router.post(
        "/v1/responses",
        responses=json_responses(ResponseObject, *ERROR_STATUSES, is_streamable=True),
        openapi_extra=json_request_body(ResponsesRequest),
    )
    async def create_response(request: Request) -> Response:
        """Generate a response, statelessly."""
        with _naming(_RESPONSES_NAMES):
            return await chats.respond(request, ResponsesRequest, _response_chat)

    @router.post(
        "/v1/messages",
        responses=json_responses(MessageResponse, *ERROR_STATUSES, is_streamable=True),
        openapi_extra=json_request_body(MessagesRequest),
    )
    async def create_message(request: Request) -> Response:
        """Generate the next message, in Anthropic's form."""
        with _naming(_MESSAGES_NAMES):
            return await chats.respond(request, MessagesRequest, _message_chat)

    @router.post(
        "/v1/messages/count_tokens",
        response_model=None,
        responses=json_responses(CountTokensResponse, *ERROR_STATUSES),
        openapi_extra=json_request_body(CountTokensRequest),
    )
    async def count_tokens(request: Request) -> dict[str, int]:
        """Count the tokens of a prompt."""
        n_tokens = await chats.count_prompt_tokens(request, CountTokensRequest, _message_chat)
        return {"input_tokens": n_tokens}

    return router


@contextmanager
def _naming(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors name fields as the API does that was called."""
    try:
        yield
    except ApiError as error:
        raise error.renamed(names) from error


def _response_chat(
    body: ResponsesRequest, origin: Origin
) -> tuple[ChatCompletionRequest, Rendering]:
    return _chat(body.to_chat()), ResponsesRendering(body, origin)


def _message_chat(
    body: CountTokensRequest, origin: Origin
) -> tuple[ChatCompletionRequest, Rendering]:
    return _chat(body.to_chat()), MessagesRendering(origin)


def _chat(fields: Mapping[str, Any]) -> ChatCompletionRequest:
    """Return the chat of a translated request; raises ApiError that names the chat's field."""
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise from_validation_errors(
            [{**detail, "loc": ("body", *detail["loc"])} for detail in errors]
        ) from error
