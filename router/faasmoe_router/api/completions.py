"""POST /v1/chat/completions and POST /v1/completions.

Both routes validate and preprocess their own kind of body into `GenerationRequest`s. The rest is
shared: admission, generation, and a response that is either one JSON body or a stream of
server-sent events. However a request ends, its sequences are freed and its usage is recorded.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from faasmoe_router.api.admission import (
    RequestActivator,
    TenantAdmission,
    queue_until_activated,
    record_outcome_on_error,
)
from faasmoe_router.api.body import BodyReader
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.openapi import (
    ChatCompletionResponse,
    CompletionResponse,
    json_request_body,
    json_responses,
)
from faasmoe_router.api.preprocessing import Preprocessor
from faasmoe_router.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionRequestBase,
    StreamOptions,
)
from faasmoe_router.api.reasoning import resolve_message_format
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
    KEEPALIVE_S,
    EventStreamResponse,
    run_until_disconnect,
    sse_frames,
)
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.service import Caller, RequestUsageRecorder

ERROR_STATUSES = (400, 404, 413, 429, 500, 503)
WARNING_HEADER = "X-FaaSMoE-Warning"
MAX_WARNING_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that this router serves.

    Attributes:
        name: the name that requests give it.
        fingerprint: identifies its weights and the numerics they run with; None if unknown.
    """

    name: str
    fingerprint: str | None = None

    @property
    def extra_fields(self) -> Mapping[str, str]:
        """Fields of every response that this model generates."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}


def completion_routes(
    engine: Engine,
    *,
    served_model: ServedModel,
    activator: RequestActivator,
    tenant_admission: TenantAdmission,
    bodies: BodyReader,
    preprocessor: Preprocessor,
) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter()
    generator = _ResponseGenerator(
        engine,
        served_model=served_model,
        activator=activator,
        tenant_admission=tenant_admission,
    )

    def check_request(body: CompletionRequestBase, caller: Caller) -> None:
        if body.model is not None and body.model not in caller.model_names(served_model.name):
            raise model_not_found(body.model)
        body.check_params()

    async def prepare_chat(request: Request, caller: Caller) -> _PreparedRequest:
        async with bodies.reading(request, ChatCompletionRequest, caller) as body:
            check_request(body, caller)
            tool_config, requests = await run_until_disconnect(
                request, preprocessor.build_chat_requests(body, caller)
            )
            message_format = resolve_message_format(
                body, engine.tokenizer, requests[0].prompt_token_ids, tool_config
            )
            formatter = ChatChoiceFormatter(_logprob_token_bytes(engine, body), message_format)
            notes = () if tool_config is None else tool_config.notes
            headers = {WARNING_HEADER: _header_value("; ".join(notes))} if notes else {}
            return _PreparedRequest(body.without_contents(), requests, formatter, headers)

    async def prepare_completion(request: Request, caller: Caller) -> _PreparedRequest:
        async with bodies.reading(request, CompletionRequest, caller) as body:
            check_request(body, caller)
            requests, echoed_prompts = await run_until_disconnect(
                request, preprocessor.build_completion_requests(body, caller)
            )
            token_bytes = _logprob_token_bytes(engine, body)
            formatter = CompletionChoiceFormatter(token_bytes, echoed_prompts)
            return _PreparedRequest(body.without_contents(), requests, formatter)

    @router.post(
        "/v1/chat/completions",
        responses=json_responses(ChatCompletionResponse, *ERROR_STATUSES, is_streamable=True),
        openapi_extra=json_request_body(ChatCompletionRequest),
    )
    async def create_chat_completion(request: Request) -> Response:
        """Generate the next message of a conversation."""
        return await generator.respond(request, await prepare_chat(request, get_caller(request)))

    @router.post(
        "/v1/completions",
        responses=json_responses(CompletionResponse, *ERROR_STATUSES, is_streamable=True),
        openapi_extra=json_request_body(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        """Generate the continuation of one or several prompts."""
        prepared = await prepare_completion(request, get_caller(request))
        return await generator.respond(request, prepared)

    return router


@dataclass(frozen=True, slots=True)
class _PreparedRequest:
    """A request that is ready to be generated.

    Attributes:
        body: its parameters, without what only the prompt needs.
        requests: one generation request per choice of each prompt.
        formatter: formats the choices.
        headers: headers of the response.
    """

    body: CompletionRequestBase
    requests: Sequence[GenerationRequest]
    formatter: ChoiceFormatter
    headers: Mapping[str, str] = field(default_factory=dict)


class _ResponseGenerator:
    """Admits a preprocessed request, generates its choices and responds, whole or streamed."""

    def __init__(
        self,
        engine: Engine,
        *,
        served_model: ServedModel,
        activator: RequestActivator,
        tenant_admission: TenantAdmission,
    ) -> None:
        self._engine = engine
        self._served_model = served_model
        self._activator = activator
        self._tenant_admission = tenant_admission

    async def respond(self, request: Request, prepared: _PreparedRequest) -> Response:
        """Return the response to a request; raises RouterError if it is not admitted."""
        body, requests = prepared.body, prepared.requests
        if not self._engine.is_ready:
            raise EngineUnavailable("the engine is starting")
        caller = get_caller(request)
        n_prompt_tokens = sum(len(r.prompt_token_ids) for r in requests) // (body.n or 1)
        builder = self._response_builder(body, prepared.formatter, n_prompt_tokens, len(requests))
        usage_recorder = self._tenant_admission.admit(caller, requests, n_prompt=n_prompt_tokens)
        start = asyncio.create_task(self._start(request, requests, usage_recorder))
        try:
            if body.stream and not (await asyncio.wait({start}, timeout=KEEPALIVE_S))[0]:
                # From now on comments keep the connection; an error can only be an event.
                return self._late_stream(builder, start, prepared, usage_recorder)
            headers, generation = await start
            with record_outcome_on_error(usage_recorder):
                response = await _to_http_response(builder, generation, request, body)
        except asyncio.CancelledError:
            start.cancel()
            raise
        response.headers.update({**headers, **usage_recorder.headers, **prepared.headers})
        return response

    async def _start(
        self,
        request: Request,
        requests: Sequence[GenerationRequest],
        usage_recorder: RequestUsageRecorder,
    ) -> tuple[dict[str, str], Generation]:
        """Wait for activation and start the generation; return it and response headers."""
        caller = get_caller(request)
        queue_slot = partial(self._tenant_admission.queue_slot, caller)
        with record_outcome_on_error(usage_recorder):
            headers = await queue_until_activated(
                self._activator, request, requests, queue_slot=queue_slot
            )
            generation = self._engine.generate(
                requests, tenant=caller.tenant, usage_recorder=usage_recorder
            )
        return headers, generation

    def _late_stream(
        self,
        builder: ResponseBuilder,
        start: asyncio.Task[tuple[dict[str, str], Generation]],
        prepared: _PreparedRequest,
        usage_recorder: RequestUsageRecorder,
    ) -> Response:
        """Return a stream whose generation has not started yet."""

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            _, generation = await start
            async for chunk in builder.stream_chunks(
                generation, prepared.body.stream_options or StreamOptions()
            ):
                yield chunk

        def close() -> None:
            if start.done() and not start.cancelled() and start.exception() is None:
                start.result()[1].cancel()
            start.cancel()

        response = EventStreamResponse(sse_frames(chunks()), close)
        response.headers.update({**usage_recorder.headers, **prepared.headers})
        return response

    def _response_builder(
        self,
        body: CompletionRequestBase,
        formatter: ChoiceFormatter,
        n_prompt_tokens: int,
        n_choices: int,
    ) -> ResponseBuilder:
        extra_fields = {**self._served_model.extra_fields, **body.extra_response_fields}
        return ResponseBuilder(
            formatter,
            ResponseMeta(formatter.id_prefix, body.model or self._served_model.name, extra_fields),
            RequestCounts(n_prompt_tokens, n_choices, body.n or 1),
        )


async def _to_http_response(
    builder: ResponseBuilder, generation: Generation, request: Request, body: CompletionRequestBase
) -> Response:
    if body.stream:
        options = body.stream_options or StreamOptions()
        frames = sse_frames(builder.stream_chunks(generation, options))
        return EventStreamResponse(frames, generation.cancel)
    try:
        return JSONResponse(await run_until_disconnect(request, builder.full_response(generation)))
    finally:
        generation.cancel()


def _header_value(text: str) -> str:
    """Return a text as the value of a header: one line of printable ASCII."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return line[:MAX_WARNING_LENGTH]


def _logprob_token_bytes(engine: Engine, body: CompletionRequestBase) -> TokenBytes | None:
    return None if body.n_logprobs is None else engine.vocabulary.token_bytes
