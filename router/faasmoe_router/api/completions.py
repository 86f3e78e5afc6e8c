"""POST /v1/chat/completions and POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from faasmoe_router.api.admission import Admission, admit
from faasmoe_router.api.answers import Answer
from faasmoe_router.api.calling import calling_of
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.logprobs import TokenBytes
from faasmoe_router.api.prompts import PromptReader
from faasmoe_router.api.requests import ChatBody, CompletionBody, SamplingBody, StreamOptions
from faasmoe_router.api.shapes import ChatShape, CompletionShape, Shape
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
        calling = calling_of(body, engine.codec)
        requests = await prompts.read_chat(body, calling)
        shape = ChatShape(_token_bytes(engine, body), calling)
        return await respond(request, body, requests, shape)

    @router.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        check(body)
        requests = await prompts.read_completion(body)
        echoed = _echoed(engine, body, requests) if body.echo else None
        shape = CompletionShape(_token_bytes(engine, body), echoed)
        return await respond(request, body, requests, shape)

    return router


def _token_bytes(engine: Engine, body: SamplingBody) -> TokenBytes | None:
    return None if body.n_logprobs is None else engine.vocabulary.token_bytes


def _echoed(
    engine: Engine, body: CompletionBody, requests: Sequence[GenerationRequest]
) -> list[str]:
    """Return the prompt of each choice as text, word for word where it came as text."""
    prompts = [p if isinstance(p, str) else engine.codec.decode(p) for p in body.prompt]
    n = len(requests) // len(prompts)
    return [prompt for prompt in prompts for _ in range(n)]


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
        options = body.stream_options or StreamOptions()
        return EventStream(answer.events(generation, options), generation)
    try:
        whole: dict[str, Any] = await unless_hung_up(request, answer.whole(generation))
    finally:
        generation.cancel()
    return JSONResponse(whole)
