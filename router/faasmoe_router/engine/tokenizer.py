"""The vocabulary as bytes: what each token stands for, byte by byte, and llguidance's view of it.

Made when something first needs it (a second for 150,000 tokens): a server whose clients ask neither
for log-probabilities nor for grammars never does.

Text to tokens and back: the tokenizer's prompts, its chat template, its incremental decoding.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from jinja2 import TemplateError
from llguidance import LLTokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from faasmoe_router.errors import ChatTemplateError, GrammarError, RouterConfigError


class Vocabulary:
    """A model's tokens as bytes; safe to use from several threads.

    Args:
        backend: the tokenizer.
        n_tokens: the model's scores for one position; it may have more than the tokenizer has
            tokens.
        eos_ids: the tokens that end a text.
    """

    def __init__(self, backend: Tokenizer, *, n_scores: int, eos_token_ids: Sequence[int]) -> None:
        self._backend = backend
        self._n_scores = max(n_scores, backend.get_vocab_size(with_added_tokens=True))
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None

    @property
    def ll_tokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance has it; raises ConstraintError if it has none such."""
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._make_ll_tokenizer()
            return self._ll_tokenizer

    def prepare(self) -> None:
        """Make it now, which takes a while; raises ConstraintError."""
        _ = self.ll_tokenizer

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text; a special token's are its name."""
        text: bytes = self.ll_tokenizer.decode_bytes([token])
        return text

    def _make_ll_tokenizer(self) -> LLTokenizer:
        try:
            return LLTokenizer(
                self._backend.to_str(),
                n_vocab=self._n_scores,
                eos_token=self._eos_token_ids or None,
            )
        except (ValueError, TypeError) as error:
            raise GrammarError(f"the model's tokenizer cannot be constrained: {error}") from error


_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, KeyError, AttributeError),
    *(IndexError, ArithmeticError, RecursionError),
)


@dataclass(frozen=True, slots=True)
class ChatTemplateOptions:
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
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


DEFAULT_CHAT_TEMPLATE_OPTIONS = ChatTemplateOptions()
# What `variables` may not be called: transformers' own.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"messages", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
)


class ModelTokenizer:
    """What the engine and the API need of a tokenizer; safe to call from several threads.

    Attributes:
        longest_token_bytes: the most bytes of UTF-8 text that one token stands for.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RouterConfigError(
                f"tokenizer: got {type(tokenizer).__name__}, expected one with a tokenizer.json"
            )
        # A tokenizer.json may carry the limits of its training; the context is checked elsewhere.
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer = tokenizer
        self._backend: Tokenizer = backend
        self.max_token_bytes = _max_token_bytes(backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can be talked to in messages."""
        return bool(self._tokenizer.chat_template)

    @property
    def tool_chat_template(self) -> str:
        """The chat template that is used where there are tools; empty if there is none."""
        templates = self._tokenizer.chat_template or ""
        if isinstance(templates, dict):
            templates = templates.get("tool_use") or templates.get("default") or ""
        return str(templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text's tokens, with those that the tokenizer adds to a prompt (as BOS)."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatTemplateOptions = DEFAULT_CHAT_TEMPLATE_OPTIONS,
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
                tools=list(options.tools) or None,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                tokenize=False,
                **options.template_kwargs,
            )
            return self.encode(text, add_special_tokens=False)  # half a surrogate is no text
        except _TEMPLATE_ERRORS as error:
            raise ChatTemplateError(f"the model's chat template refuses them: {error}") from error

    def decode(self, ids: Sequence[int], *, include_special_tokens: bool = False) -> str:
        """Return the text of tokens, with or without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=not include_special_tokens)
        return text

    def special_token_id(self, text: str) -> int | None:
        """Return the special token of this name, if there is one."""
        token: int | None = self._backend.token_to_id(text)
        return None if token is None or self.decode([token]) else token

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary writes them."""
        return [self._backend.id_to_token(token) or "" for token in ids]

    def new_detokenizer(self, *, include_special_tokens: bool = False) -> "Detokenizer":
        """Return a new incremental decoder, of special tokens too or without them."""
        return Detokenizer(self._backend, include_special_tokens=include_special_tokens)

    def new_vocabulary(self, *, n_scores: int, eos_token_ids: Sequence[int]) -> Vocabulary:
        """Return the tokens as bytes, for a model with so many scores and these end tokens."""
        return Vocabulary(self._backend, n_scores=n_scores, eos_token_ids=eos_token_ids)


def _max_token_bytes(backend: Tokenizer) -> int:
    # In UTF-8, whatever the token stands for: bytes written as characters only make it longer.
    return max((len(token.encode()) for token in backend.get_vocab()), default=1)


class Detokenizer:
    """Turns one request's tokens into text as they come; a character comes whole or not yet."""

    def __init__(self, backend: Tokenizer, *, include_special_tokens: bool = False) -> None:
        self._backend = backend
        self._skip_special = not include_special_tokens
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        self._undecoded: list[int] = []

    def feed(self, token: int) -> str:
        """Take one token; return the text that is certain now."""
        self._undecoded.append(token)
        text: str | None = self._stream.step(self._backend, token)
        if text is None:
            return ""
        self._undecoded.clear()
        return text

    def flush(self) -> str:
        """Return what is left at the end: the bytes of a character that was never finished."""
        text: str = self._backend.decode(self._undecoded, skip_special_tokens=self._skip_special)
        self._undecoded.clear()
        return text
