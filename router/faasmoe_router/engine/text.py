"""Text to tokens and back: the tokenizer's prompts, its chat template, its incremental decoding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from faasmoe_router.engine.vocabulary import Vocabulary
from faasmoe_router.errors import ChatTemplateError, ConfigError

_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, KeyError, AttributeError),
    *(IndexError, ArithmeticError, RecursionError),
)


@dataclass(frozen=True, slots=True)
class ChatView:
    """What a chat template is told besides the messages.

    Attributes:
        tools: the functions that the assistant may call, in OpenAI's form.
        add_generation_prompt: whether the assistant's turn begins after the messages.
        continue_final_message: whether the last message goes on.
        variables: what else the template is given.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


FROM_THE_ASSISTANT = ChatView()
# What `variables` may not be called: transformers' own.
RESERVED_VARIABLES = frozenset(
    {"messages", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
)


class TextCodec:
    """What the engine and the API need of a tokenizer; safe to call from several threads.

    Attributes:
        longest_token_bytes: the most bytes of UTF-8 text that one token stands for.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"tokenizer: got {type(tokenizer).__name__}, expected one with a tokenizer.json"
            )
        # A tokenizer.json may carry the limits of its training; the context is checked elsewhere.
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer = tokenizer
        self._backend: Tokenizer = backend
        self.longest_token_bytes = _longest_token_bytes(backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can be talked to in messages."""
        return bool(self._tokenizer.chat_template)

    @property
    def template(self) -> str:
        """The chat template that is used where there are tools; empty if there is none."""
        found = self._tokenizer.chat_template or ""
        if isinstance(found, dict):
            found = found.get("tool_use") or found.get("default") or ""
        return str(found)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's tokens, with those that the tokenizer adds to a prompt (as BOS)."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], view: ChatView = FROM_THE_ASSISTANT
    ) -> list[int]:
        """Return the tokens of a conversation up to where the assistant begins to speak.

        Raises:
            ChatTemplateError: the model has no chat template, or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise ChatTemplateError("the model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(view.tools) or None,
                add_generation_prompt=view.add_generation_prompt,
                continue_final_message=view.continue_final_message,
                tokenize=False,
                **view.variables,
            )
            return self.encode(text, special=False)  # half a surrogate is no text
        except _TEMPLATE_ERRORS as error:
            raise ChatTemplateError(f"the model's chat template refuses them: {error}") from error

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens, with or without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=not special)
        return text

    def special_id(self, text: str) -> int | None:
        """Return the special token of this name, if there is one."""
        token: int | None = self._backend.token_to_id(text)
        return None if token is None or self.decode([token]) else token

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary writes them."""
        return [self._backend.id_to_token(token) or "" for token in ids]

    def detokenizer(self, *, special: bool = False) -> "Detokenizer":
        """Return a new incremental decoder, of special tokens too or without them."""
        return Detokenizer(self._backend, special=special)

    def vocabulary(self, *, n_tokens: int, eos_ids: Sequence[int]) -> Vocabulary:
        """Return the tokens as bytes, for a model with so many scores and these end tokens."""
        return Vocabulary(self._backend, n_tokens=n_tokens, eos_ids=eos_ids)


def _longest_token_bytes(backend: Tokenizer) -> int:
    # In UTF-8, whatever the token stands for: bytes written as characters only make it longer.
    return max((len(token.encode()) for token in backend.get_vocab()), default=1)


class Detokenizer:
    """Turns one request's tokens into text as they come; a character comes whole or not yet."""

    def __init__(self, backend: Tokenizer, *, special: bool = False) -> None:
        self._backend = backend
        self._skip_special = not special
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """Take one token; return the text that is certain now."""
        self._pending.append(token)
        text: str | None = self._stream.step(self._backend, token)
        if text is None:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Return what is left at the end: the bytes of a character that was never finished."""
        text: str = self._backend.decode(self._pending, skip_special_tokens=self._skip_special)
        self._pending.clear()
        return text
