"""POST /v1/chat/completions and POST /v1/completions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from faasmoe_router.api.admission import Admission, admit
from faasmoe_router.api.answers import Answer, ChatShape, CompletionShape, Shape
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.prompts import PromptReader
from faasmoe_router.api.requests import ChatBody, CompletionBody, SamplingBody
from faasmoe_router.api.stream import ClientGone, EventStream, unless_hung_up
from faasmoe_router.api.tenancy import Reception, caller_of, settled_on_error
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.callers import Caller

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it


def completion_routes(
    engine: Engine, *, model_name: str, admission: Admission, reception: Reception
) -> APIRouter:
    """Return the routes that generate."""
    router = APIRouter()
    prompts = PromptReader(engine)

    def check(body: SamplingBody, caller: Caller) -> None:
        if body.model not in caller.model_names(model_name):
            raise model_not_found(body.model)
        body.check()

    async def respond(
        request: Request, body: SamplingBody, requests: Sequence[GenerationRequest], shape: Shape
    ) -> Response:
        if not engine.ready:
            raise EngineUnavailable("the engine is starting")
        caller = caller_of(request)
        ticket = reception.admit(caller, requests)
        holding = partial(reception.holding, caller)
        try:
            with settled_on_error(ticket):
                headers = await admit(admission, request, requests, holding=holding)
                generation = engine.generate(requests, tenant=caller.tenant, ticket=ticket)
                response = await _tell(generation, request, body, requests=requests, shape=shape)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        response.headers.update({**headers, **ticket.headers})
        return response

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Continue a conversation."""
        caller = caller_of(request)
        check(body, caller)
        requests = await prompts.read_chat(body, caller)
        return await respond(request, body, requests, ChatShape())

    @router.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        caller = caller_of(request)
        check(body, caller)
        requests = await prompts.read_completion(body, caller)
        return await respond(request, body, requests, CompletionShape())

    return router


async def _tell(
    generation: Generation,
    request: Request,
    body: SamplingBody,
    *,
    requests: Sequence[GenerationRequest],
    shape: Shape,
) -> Response:
    n_prompt_tokens = sum(len(r.prompt_ids) for r in requests) // (body.n or 1)
    answer = Answer(shape, body.model, n_choices=len(requests), n_prompt_tokens=n_prompt_tokens)
    if body.stream:
        return EventStream(answer.events(generation, include_usage=body.include_usage), generation)
    try:
        whole: dict[str, Any] = await unless_hung_up(request, answer.whole(generation))
    finally:
        generation.cancel()
    return JSONResponse(whole)
