"""POST /v1/chat/completions and POST /v1/completions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from faasmoe_router.api.admission import Admission, admit
from faasmoe_router.api.answers import Answer, Asked, Head
from faasmoe_router.api.calling import calling_of
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.logprobs import TokenBytes
from faasmoe_router.api.models import ServedModel
from faasmoe_router.api.openapi import answers
from faasmoe_router.api.prompts import PromptReader
from faasmoe_router.api.requests import ChatBody, CompletionBody, SamplingBody, StreamOptions
from faasmoe_router.api.shapes import ChatShape, CompletionShape, Shape
from faasmoe_router.api.stream import ClientGone, EventStream, unless_hung_up
from faasmoe_router.api.tenancy import Reception, caller_of, settled_on_error
from faasmoe_router.api.told import ChatCompletion, TextCompletion
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.callers import Caller

ERRORS = (400, 404, 413, 429, 500, 503)
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it


def completion_routes(
    engine: Engine, *, served: ServedModel, admission: Admission, reception: Reception
) -> APIRouter:
    """Return the routes that generate."""
    router = APIRouter()
    prompts = PromptReader(engine)

    def check(body: SamplingBody, caller: Caller) -> None:
        if body.model not in caller.model_names(served.name):
            raise model_not_found(body.model)
        body.check()

    async def respond(
        request: Request, body: SamplingBody, requests: Sequence[GenerationRequest], shape: Shape
    ) -> Response:
        if not engine.ready:
            raise EngineUnavailable("the engine is starting")
        caller = caller_of(request)
        n_prompt = sum(len(r.prompt_ids) for r in requests) // (body.n or 1)
        head = Head(shape.prefix, body.model, {**served.told, **body.told})
        answer = Answer(shape, head, Asked(n_prompt, len(requests), body.n or 1))
        ticket = reception.admit(caller, requests, n_prompt=n_prompt)
        holding = partial(reception.holding, caller)
        try:
            with settled_on_error(ticket):
                headers = await admit(admission, request, requests, holding=holding)
                generation = engine.generate(requests, tenant=caller.tenant, ticket=ticket)
                response = await _tell(answer, generation, request, body)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        response.headers.update({**headers, **ticket.headers})
        return response

    @router.post("/v1/chat/completions", responses=answers(ChatCompletion, *ERRORS, streams=True))
    async def chat(body: ChatBody, request: Request) -> Response:
        """Continue a conversation."""
        caller = caller_of(request)
        check(body, caller)
        calling = calling_of(body, engine.codec)
        requests = await prompts.read_chat(body, calling, caller)
        shape = ChatShape(_token_bytes(engine, body), calling)
        return await respond(request, body, requests, shape)

    @router.post("/v1/completions", responses=answers(TextCompletion, *ERRORS, streams=True))
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        caller = caller_of(request)
        check(body, caller)
        requests = await prompts.read_completion(body, caller)
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


async def _tell(
    answer: Answer, generation: Generation, request: Request, body: SamplingBody
) -> Response:
    if body.stream:
        options = body.stream_options or StreamOptions()
        return EventStream(answer.events(generation, options), generation)
    try:
        whole: dict[str, Any] = await unless_hung_up(request, answer.whole(generation))
    finally:
        generation.cancel()
    return JSONResponse(whole)
