"""POST /tokenize and /detokenize, also under /v1, with vLLM's request and response bodies."""

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import APIRouter, Request

from faasmoe_router.api.body import BodyReader
from faasmoe_router.api.chat_templates import template_variables
from faasmoe_router.api.documented_routes import new_router
from faasmoe_router.api.errors import invalid_value, model_not_found
from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.openapi import (
    DetokenizeResponse,
    TokenizeResponse,
    json_request_body,
    json_responses,
)
from faasmoe_router.api.prompt_encoding import PromptEncoder
from faasmoe_router.api.protocol import Messages, Tools
from faasmoe_router.api.streaming import run_until_disconnect
from faasmoe_router.api.validation import RequestModel, Text, TokenIds, reject_unsupported
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ChatTemplateOptions
from faasmoe_router.tenants.service import Caller

MAX_TOKENS = 1 << 16  # decoded at once; decoding them holds the interpreter for 10 ms
ERROR_STATUSES = (400, 404, 413, 500, 503)
_UNSUPPORTED_PARAMS: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "mm_processor_kwargs": ({},),
}


class TokenizeRequest(RequestModel):
    """The body of POST /tokenize: either a prompt or the messages of a chat."""

    unsupported_parameters = _UNSUPPORTED_PARAMS

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None

    def check_params(self) -> None:
        """Check constraints between parameters; raises ApiError."""
        reject_unsupported(self.model_extra, _UNSUPPORTED_PARAMS)
        if (self.prompt is None) == (self.messages is None):
            raise invalid_value("prompt", "expected exactly one of 'prompt' and 'messages'")

    def template_options(self, chat_template: str) -> ChatTemplateOptions:
        """Return the inputs of a chat template besides the messages; raises ApiError."""
        return ChatTemplateOptions(
            tools=tuple(tool.to_template(chat_template) for tool in self.tools or ()),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            add_special_tokens=bool(self.add_special_tokens),
            template_kwargs=template_variables(self.chat_template_kwargs),
        )


class DetokenizeRequest(RequestModel):
    """The body of POST /detokenize."""

    model: Text | None = None
    tokens: TokenIds


def tokenization_routes(
    engine: Engine, *, model_name: str, bodies: BodyReader, encoder: PromptEncoder
) -> APIRouter:
    """Return the routes that tokenize and detokenize."""
    router = new_router()

    @router.post(
        "/tokenize",
        response_model=None,
        openapi_extra=json_request_body(TokenizeRequest),
        responses=json_responses(TokenizeResponse, *ERROR_STATUSES),
    )
    @router.post(
        "/v1/tokenize",
        response_model=None,
        openapi_extra=json_request_body(TokenizeRequest),
        responses=json_responses(TokenizeResponse, *ERROR_STATUSES),
    )
    async def tokenize(request: Request) -> dict[str, Any]:
        """Return the tokens of a prompt or of a chat."""
        caller = get_caller(request)
        async with bodies.reading(request, TokenizeRequest, caller) as body:
            _check_model(body.model, caller.model_names(model_name))
            body.check_params()
            ids = await run_until_disconnect(request, _tokenize(body, encoder, caller))
            with_strings = body.return_token_strs
        return {
            "count": len(ids),
            "max_model_len": caller.effective_max_model_len(engine.limits.max_model_len),
            "tokens": list(ids),
            "token_strs": engine.tokenizer.token_strings(ids) if with_strings else None,
        }

    @router.post(
        "/detokenize",
        response_model=None,
        openapi_extra=json_request_body(DetokenizeRequest),
        responses=json_responses(DetokenizeResponse, *ERROR_STATUSES),
    )
    @router.post(
        "/v1/detokenize",
        response_model=None,
        openapi_extra=json_request_body(DetokenizeRequest),
        responses=json_responses(DetokenizeResponse, *ERROR_STATUSES),
    )
    async def detokenize(request: Request) -> dict[str, str]:
        """Return the text of a list of tokens."""
        caller = get_caller(request)
        async with bodies.reading(request, DetokenizeRequest, caller) as body:
            _check_model(body.model, caller.model_names(model_name))
            _check_length(len(body.tokens), max(engine.limits.max_model_len, MAX_TOKENS))
            encoder.check_token_ids(body.tokens, param="tokens")
            decoding = encoder.decode(body.tokens, caller, include_special_tokens=True)
            text = await run_until_disconnect(request, decoding)
        return {"prompt": text}

    return router


async def _tokenize(body: TokenizeRequest, encoder: PromptEncoder, caller: Caller) -> Sequence[int]:
    if body.messages is not None:
        return await encoder.encode_chat(
            body.messages, body.template_options(encoder.tool_chat_template), caller
        )
    assert body.prompt is not None
    encoder.check_text_size([body.prompt], param="prompt")
    return await encoder.encode(
        body.prompt, add_special_tokens=body.add_special_tokens is not False, caller=caller
    )


def _check_length(n_tokens: int, max_tokens: int) -> None:
    if n_tokens > max_tokens:
        raise invalid_value("tokens", f"expected at most {max_tokens} token IDs, got {n_tokens}")


def _check_model(requested: str | None, names: Collection[str]) -> None:
    if requested is not None and requested not in names:
        raise model_not_found(str(requested))
