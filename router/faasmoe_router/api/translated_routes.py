"""The routes of APIs that are translated onto chats: responses and messages."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from faasmoe_router.api.completions import ERROR_STATUSES, ChatService
from faasmoe_router.api.errors import from_validation_errors
from faasmoe_router.api.messages_endpoint import (
    CountTokensRequest,
    MessagesRendering,
    MessagesRequest,
)
from faasmoe_router.api.openapi import (
    CountTokensResponse,
    MessageResponse,
    ResponseObject,
    json_responses,
)
from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.api.responses_endpoint import ResponsesRendering, ResponsesRequest


def translated_routes(chats: ChatService) -> APIRouter:
    """Return the routes of POST /v1/responses, /v1/messages and /v1/messages/count_tokens."""
    router = APIRouter()

    @router.post(
        "/v1/responses",
        responses=json_responses(ResponseObject, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Generate a response, statelessly."""
        return await chats.respond(_chat(body.to_chat()), request, ResponsesRendering(body))

    @router.post(
        "/v1/messages",
        responses=json_responses(MessageResponse, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Generate the next message, in Anthropic's form."""
        return await chats.respond(_chat(body.to_chat()), request, MessagesRendering())

    @router.post(
        "/v1/messages/count_tokens",
        response_model=None,
        responses=json_responses(CountTokensResponse, *ERROR_STATUSES),
    )
    async def count_tokens(body: CountTokensRequest, request: Request) -> dict[str, int]:
        """Count the tokens of a prompt."""
        return {"input_tokens": await chats.count_prompt_tokens(_chat(body.to_chat()), request)}

    return router


def _chat(fields: Mapping[str, Any]) -> ChatCompletionRequest:
    """Return the chat of a translated request; raises ApiError that names the chat's field."""
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise from_validation_errors(
            [{**detail, "loc": ("body", *detail["loc"])} for detail in errors]
        ) from error
