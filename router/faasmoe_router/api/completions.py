"""POST /v1/chat/completions and POST /v1/completions.

Both routes validate and preprocess their own kind of body into `GenerationRequest`s. The rest is
shared: admission, generation, and a response that is either one JSON body or a stream of
server-sent events. However a request ends, its sequences are freed and its usage is recorded.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
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
from faasmoe_router.api.errors import model_not_found
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.openapi import ChatCompletionResponse, CompletionResponse, json_responses
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
    ClientDisconnected,
    EventStreamResponse,
    run_until_disconnect,
    sse_frames,
)
from faasmoe_router.api.tool_calling import relax_tool_schemas, resolve_tool_calling
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.engine.sampling_defaults import SamplingDefaults
from faasmoe_router.errors import EngineUnavailable
from faasmoe_router.tenants.service import Caller, RequestUsageRecorder

ERROR_STATUSES = (400, 404, 413, 429, 500, 503)
WARNING_HEADER = "X-FaaSMoE-Warning"
MAX_WARNING_LENGTH = 1000
CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; seen by middleware only


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
    sampling_defaults: SamplingDefaults,
) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter()
    preprocessor = Preprocessor(engine, sampling_defaults)
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

    @router.post(
        "/v1/chat/completions",
        responses=json_responses(ChatCompletionResponse, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Generate the next message of a conversation."""
        caller = get_caller(request)
        check_request(body, caller)
        tool_config = resolve_tool_calling(body, engine.tokenizer)
        if tool_config is not None:
            tool_config = await relax_tool_schemas(tool_config, engine.grammar_compiler)
        requests = await preprocessor.build_chat_requests(body, tool_config, caller)
        message_format = resolve_message_format(
            body, engine.tokenizer, requests[0].prompt_token_ids, tool_config
        )
        formatter = ChatChoiceFormatter(_logprob_token_bytes(engine, body), message_format)
        response = await generator.respond(request, body, requests, formatter)
        if tool_config is not None and tool_config.notes:
            response.headers[WARNING_HEADER] = _header_value("; ".join(tool_config.notes))
        return response

    @router.post(
        "/v1/completions",
        responses=json_responses(CompletionResponse, *ERROR_STATUSES, is_streamable=True),
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Generate the continuation of one or several prompts."""
        caller = get_caller(request)
        check_request(body, caller)
        requests = await preprocessor.build_completion_requests(body, caller)
        echoed_prompts = _echoed_prompts(engine, body, requests) if body.echo else None
        formatter = CompletionChoiceFormatter(_logprob_token_bytes(engine, body), echoed_prompts)
        return await generator.respond(request, body, requests, formatter)

    return router


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

    async def respond(
        self,
        request: Request,
        body: CompletionRequestBase,
        requests: Sequence[GenerationRequest],
        formatter: ChoiceFormatter,
    ) -> Response:
        """Return the response to a request; raises RouterError if it is not admitted.

        Args:
            request: the HTTP request.
            body: its validated body.
            requests: one generation request per choice of each prompt.
            formatter: formats the choices.
        """
        if not self._engine.is_ready:
            raise EngineUnavailable("the engine is starting")
        caller = get_caller(request)
        n_prompt_tokens = sum(len(r.prompt_token_ids) for r in requests) // (body.n or 1)
        builder = self._response_builder(body, formatter, n_prompt_tokens, len(requests))
        usage_recorder = self._tenant_admission.admit(caller, requests, n_prompt=n_prompt_tokens)
        start = asyncio.create_task(self._start(request, requests, usage_recorder))
        try:
            if body.stream and not (await asyncio.wait({start}, timeout=KEEPALIVE_S))[0]:
                # From now on comments keep the connection; an error can only be an event.
                return self._late_stream(builder, start, body, usage_recorder)
            headers, generation = await start
            with record_outcome_on_error(usage_recorder):
                response = await _to_http_response(builder, generation, request, body)
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except asyncio.CancelledError:
            start.cancel()
            raise
        response.headers.update({**headers, **usage_recorder.headers})
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
        body: CompletionRequestBase,
        usage_recorder: RequestUsageRecorder,
    ) -> Response:
        """Return a stream whose generation has not started yet."""

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            _, generation = await start
            async for chunk in builder.stream_chunks(
                generation, body.stream_options or StreamOptions()
            ):
                yield chunk

        def close() -> None:
            if start.done() and not start.cancelled() and start.exception() is None:
                start.result()[1].cancel()
            start.cancel()

        response = EventStreamResponse(sse_frames(chunks()), close)
        response.headers.update(usage_recorder.headers)
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


def _echoed_prompts(
    engine: Engine, body: CompletionRequest, requests: Sequence[GenerationRequest]
) -> list[str]:
    """Return the prompt text of each choice: verbatim if given as text, decoded if as tokens."""
    prompts = [p if isinstance(p, str) else engine.tokenizer.decode(p) for p in body.prompt]
    n = len(requests) // len(prompts)
    return [prompt for prompt in prompts for _ in range(n)]
