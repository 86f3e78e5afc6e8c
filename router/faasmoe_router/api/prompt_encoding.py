"""From texts and conversations to the tokens of a prompt, and back.

What can be rejected without tokenizing is rejected first: tokenizing a long text takes seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from faasmoe_router.api.chat_templates import message_texts
from faasmoe_router.api.errors import ApiError, invalid_value
from faasmoe_router.api.preparation import PreparationQueue
from faasmoe_router.api.protocol import ChatMessage
from faasmoe_router.api.structured_outputs import dump_json
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ChatTemplateOptions
from faasmoe_router.errors import ChatTemplateError
from faasmoe_router.tenants.service import ANONYMOUS, Caller
from faasmoe_router.toolcalls.prompted import with_prompted_tools
from faasmoe_tracing import NO_SPAN, Span

# Work in units of bytes of text: of a token ID, of a message's rendering and of a tool's.
ID_BYTES, MESSAGE_BYTES, TOOL_BYTES = 4, 64, 1024


class PromptEncoder:
    """Tokenizes prompts and conversations, and decodes tokens; bound to one event loop.

    Args:
        engine: has the tokenizer and the context length.
        queue: runs the work, in turns between tenants.
    """

    def __init__(self, engine: Engine, queue: PreparationQueue) -> None:
        self._engine = engine
        self._queue = queue

    async def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        caller: Caller = ANONYMOUS,
        span: Span = NO_SPAN,
    ) -> Sequence[int]:
        """Return the token IDs of a text, by default with the tokenizer's BOS token, if any."""
        encode = partial(self._engine.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        with span.child("tokenize"):
            return await self._queue.run(caller, encode, size_bytes=len(text))

    async def decode(
        self,
        token_ids: Sequence[int],
        caller: Caller = ANONYMOUS,
        *,
        include_special_tokens: bool = False,
    ) -> str:
        """Return the text of token IDs."""
        decode = partial(
            self._engine.tokenizer.decode,
            token_ids,
            include_special_tokens=include_special_tokens,
        )
        return await self._queue.run(caller, decode, size_bytes=ID_BYTES * len(token_ids))

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        template_options: ChatTemplateOptions,
        caller: Caller = ANONYMOUS,
        *,
        prompted_tools: Sequence[Mapping[str, Any]] = (),
        span: Span = NO_SPAN,
    ) -> Sequence[int]:
        """Return the token IDs of a conversation, with the caller's system prompt if it has one.

        `prompted_tools` are written into the messages, as the template knows no tools.

        Raises:
            ApiError: a message is invalid, the texts are too long, or the chat template fails.
        """
        size_bytes = len(caller.system_prompt or "") + sum(map(_n_characters, messages))
        size_bytes += TOOL_BYTES * (len(template_options.tools) + len(prompted_tools))
        render_and_encode = partial(
            self._encode_chat, messages, template_options, caller, prompted_tools, span
        )
        return await self._queue.run(caller, render_and_encode, size_bytes=size_bytes)

    def _encode_chat(
        self,
        messages: Sequence[ChatMessage],
        template_options: ChatTemplateOptions,
        caller: Caller,
        prompted_tools: Sequence[Mapping[str, Any]],
        span: Span,
    ) -> Sequence[int]:
        template_messages = [
            m.to_template(f"messages[{index}]") for index, m in enumerate(messages)
        ]
        template_messages = caller.with_system_prompt(template_messages)
        if not self._engine.tokenizer.knows_developer_role:
            template_messages = [_as_system_message(m) for m in template_messages]
        if prompted_tools:
            template_messages = with_prompted_tools(template_messages, prompted_tools)
        self.check_text_size(message_texts(template_messages), param="messages")
        self.check_text_size(map(dump_json, template_options.tools), param="tools")
        try:
            return self._engine.tokenizer.encode_chat(
                template_messages, template_options, span=span
            )
        except ChatTemplateError as error:
            raise invalid_value("messages", str(error)) from error

    def check_text_size(self, texts: Iterable[str], *, param: str) -> None:
        """Raise ApiError if texts have too many bytes to fit into the context, however encoded."""
        context_len = self._engine.limits.max_model_len
        max_bytes = context_len * self._engine.tokenizer.max_token_bytes
        size_bytes = sum(len(text.encode()) for text in texts)
        if size_bytes > max_bytes:
            raise ApiError(
                f"This model's maximum context length is {context_len} tokens, at most {max_bytes} "
                f"bytes of text. However, you requested {size_bytes} bytes in the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    @property
    def tool_chat_template(self) -> str:
        """The chat template used for requests with tools; empty if there is none."""
        return self._engine.tokenizer.tool_chat_template

    def check_token_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raise ApiError if a token ID is not in the vocabulary."""
        check_token_ids(token_ids, vocab_size=self._engine.vocab_size, param=param)


def check_token_ids(token_ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Raise ApiError if a token ID is not in a vocabulary."""
    if token_ids and (token_id := max(token_ids)) >= vocab_size:
        reason = f"got token ID {token_id}, which is out of vocabulary"
        raise invalid_value(param, f"{reason}, expected IDs below {vocab_size}")


def _as_system_message(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _n_characters(message: ChatMessage) -> int:
    n = len(message.content or "") + len(message.name or "")
    for call in message.tool_calls or ():
        n += len(call.function.name) + TOOL_BYTES
    return n + MESSAGE_BYTES
