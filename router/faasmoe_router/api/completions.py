"""POST /v1/chat/completions and POST /v1/completions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from faasmoe_router.api.activation import RequestActivator, queue_until_activated
from faasmoe_router.api.auth import TenantAdmission, get_caller, record_outcome_on_error
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.models import ServedModel
from faasmoe_router.api.openapi import ChatCompletionResponse, CompletionResponse, json_responses
from faasmoe_router.api.preprocessing import Preprocessor
from faasmoe_router.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionRequestBase,
    StreamOptions,
)
from faasmoe_router.api.responses import (
    ChatChoiceFormatter,
    ChoiceFormatter,
    CompletionChoiceFormatter,
    RequestCounts,
    ResponseBuilder,
    ResponseMeta,
    TokenBytes,
)
from faasmoe_router.api.streaming import (
    ClientDisconnected,
    EventStreamResponse,
    run_until_disconnect,
)
from faasmoe_router.api.tool_calling import resolve_tool_calling
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.caller import Caller

ERROR_STATUSES = (400, 404, 413, 429, 500, 503)
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is left to read it


def completion_routes(
    engine: Engine,
    *,
    served_model: ServedModel,
    activator: RequestActivator,
    tenant_admission: TenantAdmission,
) -> APIRouter:
    """Return the routes that generate."""
    router = APIRouter()
    preprocessor = Preprocessor(engine)

    def check_request(body: CompletionRequestBase, caller: Caller) -> None:
        if body.model not in caller.model_names(served_model.name):
            raise model_not_found(body.model)
        body.check_params()

    async def generate_response(
        request: Request,
        body: CompletionRequestBase,
        requests: Sequence[GenerationRequest],
        formatter: ChoiceFormatter,
    ) -> Response:
        if not engine.is_ready:
            raise EngineUnavailable("the engine is starting")
        caller = get_caller(request)
        n_prompt_tokens = sum(len(r.prompt_token_ids) for r in requests) // (body.n or 1)
        meta = ResponseMeta(
            formatter.id_prefix,
            body.model,
            {**served_model.extra_fields, **body.extra_response_fields},
        )
        builder = ResponseBuilder(
            formatter, meta, RequestCounts(n_prompt_tokens, len(requests), body.n or 1)
        )
        usage_recorder = tenant_admission.admit(caller, requests, n_prompt=n_prompt_tokens)
        queue_slot = partial(tenant_admission.queue_slot, caller)
        try:
            with record_outcome_on_error(usage_recorder):
                headers = await queue_until_activated(
                    activator, request, requests, queue_slot=queue_slot
                )
                generation = engine.generate(
                    requests, tenant=caller.tenant, usage_recorder=usage_recorder
                )
                response = await _to_http_response(builder, generation, request, body)
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        response.headers.update({**headers, **usage_recorder.headers})
        return response

    @router.post(
        "/v1/chat/completions",
        responses=json_responses(ChatCompletionResponse, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Continue a conversation."""
        caller = get_caller(request)
        check_request(body, caller)
        tool_config = resolve_tool_calling(body, engine.tokenizer)
        requests = await preprocessor.build_chat_requests(body, tool_config, caller)
        formatter = ChatChoiceFormatter(_logprob_token_bytes(engine, body), tool_config)
        return await generate_response(request, body, requests, formatter)

    @router.post(
        "/v1/completions",
        responses=json_responses(CompletionResponse, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        caller = get_caller(request)
        check_request(body, caller)
        requests = await preprocessor.build_completion_requests(body, caller)
        echoed_prompts = _echoed_prompts(engine, body, requests) if body.echo else None
        formatter = CompletionChoiceFormatter(_logprob_token_bytes(engine, body), echoed_prompts)
        return await generate_response(request, body, requests, formatter)

    return router


def _logprob_token_bytes(engine: Engine, body: CompletionRequestBase) -> TokenBytes | None:
    return None if body.n_logprobs is None else engine.vocabulary.token_bytes


def _echoed_prompts(
    engine: Engine, body: CompletionRequest, requests: Sequence[GenerationRequest]
) -> list[str]:
    """Return the prompt of each choice as text, word for word where it came as text."""
    prompts = [p if isinstance(p, str) else engine.tokenizer.decode(p) for p in body.prompt]
    n = len(requests) // len(prompts)
    return [prompt for prompt in prompts for _ in range(n)]


async def _to_http_response(
    builder: ResponseBuilder, generation: Generation, request: Request, body: CompletionRequestBase
) -> Response:
    if body.stream:
        options = body.stream_options or StreamOptions()
        return EventStreamResponse(builder.stream_chunks(generation, options), generation)
    try:
        full_response: dict[str, Any] = await run_until_disconnect(
            request, builder.full_response(generation)
        )
    finally:
        generation.cancel()
    return JSONResponse(full_response)
