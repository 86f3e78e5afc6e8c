"""POST /tokenize and /detokenize, with vLLM's bodies: texts and chats as tokens, and back."""

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from faasmoe_router.api.errors import ApiError, model_not_found
from faasmoe_router.api.fields import Text, Tokens
from faasmoe_router.api.messages import ChatMessage
from faasmoe_router.api.openapi import answers
from faasmoe_router.api.prompts import PromptReader, template_variables
from faasmoe_router.api.tenancy import caller_of
from faasmoe_router.api.told import TokenList, TokenText
from faasmoe_router.api.tools import MAX_TOOLS, ToolPart
from faasmoe_router.api.unsupported import refuse
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.text import ChatView
from faasmoe_router.tenants.callers import Caller

ERRORS = (400, 404, 413, 500, 503)
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"chat_template": (), "mm_processor_kwargs": ({},)}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    model: Text | None = None


class TokenizeBody(_Body):
    """What is to be tokenised: a prompt, or the messages of a chat."""

    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolPart] | None = Field(default=None, max_length=MAX_TOOLS)

    def check(self) -> None:
        """Refuse what is neither a prompt nor a chat; raises ApiError."""
        refuse(self.model_extra, _UNSUPPORTED)
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(
                "Invalid value for 'prompt': expected either 'prompt' or 'messages'.",
                param="prompt",
                code="invalid_value",
            )
        if self.messages is not None and self.add_special_tokens:
            refuse({"add_special_tokens": True}, {"add_special_tokens": (False,)})

    def view(self) -> ChatView:
        """Return what the chat template is told besides the messages."""
        return ChatView(
            tools=tuple(tool.for_template() for tool in self.tools or ()),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            variables=template_variables(self.chat_template_kwargs),
        )


class DetokenizeBody(_Body):
    """What is to be made text again."""

    tokens: Tokens


def token_routes(engine: Engine, *, model_name: str) -> APIRouter:
    """Return the routes that tokenise."""
    router = APIRouter()
    prompts = PromptReader(engine)

    @router.post("/tokenize", response_model=None, responses=answers(TokenList, *ERRORS))
    @router.post("/v1/tokenize", response_model=None, responses=answers(TokenList, *ERRORS))
    async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
        """Tell the tokens of a prompt or of a chat."""
        caller = caller_of(request)
        _check_model(body.model, caller.model_names(model_name))
        body.check()
        ids = await _tokens(body, prompts, caller)
        strings = engine.codec.token_strings(ids) if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": caller.context_of(engine.limits.max_model_len),
            "tokens": list(ids),
            "token_strs": strings,
        }

    @router.post("/detokenize", response_model=None, responses=answers(TokenText, *ERRORS))
    @router.post("/v1/detokenize", response_model=None, responses=answers(TokenText, *ERRORS))
    async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
        """Tell the text of tokens."""
        _check_model(body.model, caller_of(request).model_names(model_name))
        tokens = body.tokens or ()
        prompts.check_vocabulary(tokens, param="tokens")
        text = await asyncio.to_thread(engine.codec.decode, tokens, special=True)
        return {"prompt": text}

    return router


async def _tokens(body: TokenizeBody, prompts: PromptReader, caller: Caller) -> Sequence[int]:
    if body.messages is not None:
        return await prompts.encode_chat(body.messages, body.view(), caller)
    assert body.prompt is not None
    prompts.check_size([body.prompt], param="prompt")
    return await prompts.encode(body.prompt, special=body.add_special_tokens is not False)


def _check_model(given: str | None, names: Collection[str]) -> None:
    if given is not None and given not in names:
        raise model_not_found(str(given))
