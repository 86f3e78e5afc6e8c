"""The model's tokenizer: encoding, chat templates, incremental detokenization and vocabulary.

Wraps a transformers tokenizer with a `tokenizer.json`. Everything that engine and API need from it
goes through `ModelTokenizer`; nothing here knows the model or its scores.
"""

import contextlib
import json
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
from faasmoe_tracing import NO_SPAN, Span


class Vocabulary:
    """The bytes of each token, for log-probabilities and grammars; thread-safe.

    Built on first use, which takes about a second for 150,000 tokens; a server whose clients
    request neither never builds it.

    Args:
        backend: the tokenizer.
        n_scores: number of scores that the model computes per position; may exceed the number of
            tokens.
        eos_token_ids: the model's EOS tokens.
    """

    def __init__(self, backend: Tokenizer, *, n_scores: int, eos_token_ids: Sequence[int]) -> None:
        self._backend = backend
        self._n_scores = max(n_scores, backend.get_vocab_size(with_added_tokens=True))
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None

    @property
    def ll_tokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance's tokenizer; raises GrammarError if it cannot be built."""
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._make_ll_tokenizer()
            return self._ll_tokenizer

    def prepare(self) -> None:
        """Build the vocabulary now, about a second; raises GrammarError if that fails."""
        _ = self.ll_tokenizer

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text; for a special token, its name."""
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
            raise GrammarError(f"llguidance cannot use the model's tokenizer: {error}") from error


OPENAI_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, KeyError, AttributeError),
    *(IndexError, ArithmeticError, RecursionError),
)


@dataclass(frozen=True, slots=True)
class ChatTemplateOptions:
    """Inputs of a chat template besides the messages.

    Attributes:
        tools: functions that the assistant may call, in OpenAI's format.
        add_generation_prompt: whether to open the assistant's turn after the messages.
        continue_final_message: whether generation continues the last message.
        add_special_tokens: whether special tokens, such as BOS, are added to the rendered text.
        template_kwargs: additional template variables.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


DEFAULT_CHAT_TEMPLATE_OPTIONS = ChatTemplateOptions()
# Names that `template_kwargs` must not use: parameters of transformers.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"messages", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
)


class ModelTokenizer:
    """A model's tokenizer and chat template; thread-safe.

    Args:
        tokenizer: a transformers tokenizer; RouterConfigError if it has no `tokenizer.json`.

    Attributes:
        max_token_bytes: maximum number of UTF-8 bytes that one token stands for.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RouterConfigError(
                f"tokenizer: got {type(tokenizer).__name__}, expected one with a tokenizer.json"
            )
        # A tokenizer.json may contain training limits; the context length is checked elsewhere.
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer = tokenizer
        self._backend: Tokenizer = backend
        self.max_token_bytes = _max_token_bytes(backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model accepts chat messages."""
        return bool(self._tokenizer.chat_template)

    @property
    def knows_developer_role(self) -> bool:
        """Whether the chat template has a form of its own for the role `developer`."""
        templates = self._tokenizer.chat_template or ""
        texts = templates.values() if isinstance(templates, dict) else [templates]
        return any("developer" in text for text in texts)

    @property
    def tool_chat_template(self) -> str:
        """The chat template used for requests with tools; empty if there is none."""
        templates = self._tokenizer.chat_template or ""
        if isinstance(templates, dict):
            templates = templates.get("tool_use") or templates.get("default") or ""
        return str(templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, by default with those added to prompts (such as BOS)."""
        # Unlike `encode`, which would stop all other threads, this releases the interpreter.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatTemplateOptions = DEFAULT_CHAT_TEMPLATE_OPTIONS,
        *,
        span: Span = NO_SPAN,
    ) -> list[int]:
        """Return the tokens of a conversation, rendered by the chat template.

        Args:
            messages: the conversation.
            options: what the template receives.
            span: traces both steps.

        Raises:
            ChatTemplateError: the model has no chat template, or it rejects the messages.
        """
        if not self.has_chat_template:
            raise ChatTemplateError("the model has no chat template; use /v1/completions")
        try:
            with span.child("template"):
                text = self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(options.tools) or None,
                    add_generation_prompt=options.add_generation_prompt,
                    continue_final_message=options.continue_final_message,
                    tokenize=False,
                    **options.template_kwargs,
                )
            _check_roles(messages, text)
            with span.child("tokenize"):
                # Fails on lone surrogates.
                return self.encode(text, add_special_tokens=options.add_special_tokens)
        except _TEMPLATE_ERRORS as error:
            raise ChatTemplateError(f"the chat template rejected the messages: {error}") from error

    def compile_template(self) -> None:
        """Compile the chat template ahead of the first conversation; starts no thread.

        Any error is met again by a conversation, and reported to its sender.
        """
        if not self.has_chat_template:
            return
        with contextlib.suppress(*_TEMPLATE_ERRORS):
            self._tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)

    def decode(self, ids: Sequence[int], *, include_special_tokens: bool = False) -> str:
        """Return the text of tokens, by default without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=not include_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """Return the id of the one token that a text is, special or not; None if it is not one."""
        ids = self.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def special_token_id(self, text: str) -> int | None:
        """Return the id of the special token with this text; None if there is none."""
        token: int | None = self._backend.token_to_id(text)
        return None if token is None or self.decode([token]) else token

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens as written in the vocabulary; empty for unknown ids."""
        return [self._backend.id_to_token(token) or "" for token in ids]

    def new_detokenizer(self, *, include_special_tokens: bool = False) -> "Detokenizer":
        """Return a new incremental decoder, by default without special tokens."""
        return Detokenizer(self._backend, include_special_tokens=include_special_tokens)

    def new_vocabulary(self, *, n_scores: int, eos_token_ids: Sequence[int]) -> Vocabulary:
        """Return a `Vocabulary` for a model's number of scores and its EOS tokens."""
        return Vocabulary(self._backend, n_scores=n_scores, eos_token_ids=eos_token_ids)


def _check_roles(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise ChatTemplateError if a template has left out a message for its role."""
    for message in messages:
        role, content = message["role"], str(message["content"]).strip()
        escaped = json.dumps(content, ensure_ascii=False)[1:-1]
        if role not in OPENAI_ROLES and not (content in text or escaped in text):
            raise ChatTemplateError(f"the chat template knows no role {role!r}")


def _max_token_bytes(backend: Tokenizer) -> int:
    # An upper bound: byte-level tokens write single bytes as characters of up to two bytes.
    return max((len(token.encode()) for token in backend.get_vocab()), default=1)


class Detokenizer:
    """Incremental detokenizer of one sequence; emits whole characters only.

    Args:
        backend: the tokenizer.
        include_special_tokens: whether special tokens appear in the text.
    """

    def __init__(self, backend: Tokenizer, *, include_special_tokens: bool = False) -> None:
        self._backend = backend
        self._skip_special = not include_special_tokens
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        self._undecoded: list[int] = []

    def feed(self, token: int) -> str:
        """Add a token; return the text completed by it, which may be empty."""
        self._undecoded.append(token)
        text: str | None = self._stream.step(self._backend, token)
        if text is None:
            return ""
        self._undecoded.clear()
        return text

    def flush(self) -> str:
        """Return the text of an incomplete character at the end of the sequence."""
        text: str = self._backend.decode(self._undecoded, skip_special_tokens=self._skip_special)
        self._undecoded.clear()
        return text
