"""From a checked request to what the engine generates from: tokens and limits."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from faasmoe_router.api.calling import Calling
from faasmoe_router.api.choices import ChoiceReader, check_tokens
from faasmoe_router.api.constraints import to_json
from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.messages import ChatMessage
from faasmoe_router.api.requests import ChatBody, CompletionBody, SamplingBody
from faasmoe_router.api.unsupported import unsupported
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.text import RESERVED_VARIABLES, ChatView
from faasmoe_router.errors import ChatTemplateError
from faasmoe_router.tenants.callers import OPEN, Caller

MAX_ENCODINGS = 2  # at a time: long texts must not take every core from the engine


class PromptReader:
    """Makes engine requests of bodies, within what the engine may hold; belongs to one loop.

    What can be refused without the tokens is refused first: tokens of a long text take seconds.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._choices = ChoiceReader(engine)
        self._encoding = asyncio.Semaphore(MAX_ENCODINGS)

    async def read_chat(
        self, body: ChatBody, calling: Calling | None, caller: Caller = OPEN
    ) -> list[GenerationRequest]:
        """Return a request for each choice of a chat completion; raises ApiError."""
        self._check_choices(body, n_prompts=1)
        view = view_of(body, calling, template=self._engine.codec.template)
        ids = await self.encode_chat(body.messages, view, caller)
        return await self._choices.read(body, [ids], caller, param="messages", calling=calling)

    async def read_completion(
        self, body: CompletionBody, caller: Caller = OPEN
    ) -> list[GenerationRequest]:
        """Return a request for each choice of each prompt of a completion; raises ApiError."""
        self._check_choices(body, n_prompts=len(body.prompt))
        for index, prompt in enumerate(body.prompt):
            if isinstance(prompt, str):
                self.check_size([prompt], param="prompt")
            else:
                self.check_vocabulary(prompt, param=f"prompt[{index}]")
        prompts = [
            await self.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        return await self._choices.read(body, prompts, caller, param="prompt")

    async def encode(self, text: str, *, special: bool = True) -> Sequence[int]:
        """Return a text's tokens, with those that the tokenizer adds to a prompt."""
        async with self._encoding:
            return await asyncio.to_thread(self._engine.codec.encode, text, special=special)

    async def encode_chat(
        self, messages: Sequence[ChatMessage], view: ChatView, caller: Caller = OPEN
    ) -> Sequence[int]:
        """Return the tokens of a conversation; raises ApiError."""
        told = [m.for_template(f"messages[{index}]") for index, m in enumerate(messages)]
        told = caller.with_system_prompt(told)
        self.check_size(_texts(told), param="messages")
        self.check_size(map(to_json, view.tools), param="tools")
        try:
            async with self._encoding:
                return await asyncio.to_thread(self._engine.codec.encode_chat, told, view)
        except ChatTemplateError as error:
            raise ApiError(
                f"Invalid 'messages' for this model: {error}",
                param="messages",
                code="invalid_value",
            ) from error

    def check_size(self, texts: Iterable[str], *, param: str) -> None:
        """Refuse texts that no tokens could bring within the context; raises ApiError."""
        context = self._engine.limits.max_model_len
        most_bytes = context * self._engine.codec.longest_token_bytes
        size_bytes = sum(len(text.encode()) for text in texts)
        if size_bytes > most_bytes:
            raise ApiError(
                f"This model's maximum context length is {context} tokens, at most {most_bytes} "
                f"bytes of text. However, you requested {size_bytes} bytes in the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    def check_vocabulary(self, ids: Sequence[int], *, param: str) -> None:
        """Refuse tokens that the model does not have; raises ApiError."""
        check_tokens(ids, below=self._engine.vocab_size, param=param)

    def _check_choices(self, body: SamplingBody, *, n_prompts: int) -> None:
        """Refuse what would not fit into an idle engine either: trying again is no use."""
        capacity = self._engine.limits.capacity
        n = body.n or 1
        if n_prompts * n <= capacity:
            return
        param = "prompt" if n_prompts > capacity else "n"
        raise ApiError(
            f"Invalid value for '{param}': got {n_prompts} prompts with n={n}, "
            f"expected at most {capacity} choices in all.",
            param=param,
            code="invalid_value",
        )


def view_of(body: ChatBody, calling: Calling | None, *, template: str) -> ChatView:
    """Return what a chat template is told besides the messages; raises ApiError."""
    variables = template_variables(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in template:
            raise unsupported("reasoning_effort", "is not supported by this model's chat template")
        variables["reasoning_effort"] = body.reasoning_effort
    return ChatView(
        tools=() if calling is None else calling.shown,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=variables,
    )


def template_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a chat template's variables as a request gives them; raises ApiError."""
    taken = RESERVED_VARIABLES.intersection(given or ())
    if taken:
        param = f"chat_template_kwargs.{min(taken)}"
        raise ApiError(
            f"Invalid value for '{param}': expected a name that is not taken.",
            param=param,
            code="invalid_value",
        )
    return dict(given or {})


def _texts(messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for message in messages:
        yield message["content"]
        for call in message.get("tool_calls", ()):
            yield call["function"]["name"]
            yield str(call["function"]["arguments"])
