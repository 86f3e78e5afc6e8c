"""POST /v1/chat/completions and POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from faasmoe_router.api.admission import Admission, admit
from faasmoe_router.api.answers import Answer, ChatShape, CompletionShape, Shape
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.prompts import PromptReader
from faasmoe_router.api.requests import ChatBody, CompletionBody, SamplingBody
from faasmoe_router.api.stream import ClientGone, EventStream, unless_hung_up
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.errors import EngineUnavailable

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it


def completion_routes(engine: Engine, *, model_name: str, admission: Admission) -> APIRouter:
    """Return the routes that generate."""
    router = APIRouter()
    prompts = PromptReader(engine)

    def check(body: SamplingBody) -> None:
        if body.model != model_name:
            raise model_not_found(body.model)
        body.check()

    async def respond(
        request: Request, body: SamplingBody, requests: Sequence[GenerationRequest], shape: Shape
    ) -> Response:
        if not engine.ready:
            raise EngineUnavailable("the engine is starting")
        try:
            headers = await admit(admission, request, requests)
            response = await _generate(engine, request, body, requests=requests, shape=shape)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        response.headers.update(headers)
        return response

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Continue a conversation."""
        check(body)
        requests = await prompts.read_chat(body)
        return await respond(request, body, requests, ChatShape())

    @router.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        check(body)
        requests = await prompts.read_completion(body)
        return await respond(request, body, requests, CompletionShape())

    return router


async def _generate(
    engine: Engine,
    request: Request,
    body: SamplingBody,
    *,
    requests: Sequence[GenerationRequest],
    shape: Shape,
) -> Response:
    n_prompt_tokens = sum(len(r.prompt_ids) for r in requests) // (body.n or 1)
    answer = Answer(shape, body.model, n_choices=len(requests), n_prompt_tokens=n_prompt_tokens)
    generation = engine.generate(requests)
    if body.stream:
        return EventStream(answer.events(generation, include_usage=body.include_usage), generation)
    try:
        whole: dict[str, Any] = await unless_hung_up(request, answer.whole(generation))
    finally:
        generation.cancel()
    return JSONResponse(whole)
