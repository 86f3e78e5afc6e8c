"""Text to tokens and back: the tokenizer's prompts, its chat template, its incremental decoding."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from faasmoe_router.errors import ChatTemplateError, ConfigError


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

    def encode(self, text: str) -> list[int]:
        """Return a completion prompt's tokens, with those that the tokenizer adds (as BOS)."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=True).ids
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation up to where the assistant begins to speak.

        Raises:
            ChatTemplateError: the model has no chat template, or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise ChatTemplateError("the model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"the model's chat template refuses them: {error}") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def detokenizer(self) -> "Detokenizer":
        """Return a new incremental decoder."""
        return Detokenizer(self._backend)


def _longest_token_bytes(backend: Tokenizer) -> int:
    # In UTF-8, whatever the token stands for: bytes written as characters only make it longer.
    return max((len(token.encode()) for token in backend.get_vocab()), default=1)


class Detokenizer:
    """Turns one request's tokens into text as they come; a character comes whole or not yet."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
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
        text: str = self._backend.decode(self._pending, skip_special_tokens=True)
        self._pending.clear()
        return text
