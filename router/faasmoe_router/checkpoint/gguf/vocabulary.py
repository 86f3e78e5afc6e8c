"""The tokenizer and chat template of a GGUF file, checked before transformers builds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faasmoe_router.checkpoint.gguf.metadata import Metadata
from faasmoe_router.checkpoint.model_source import unsupported_source
from faasmoe_transformers.gguf_tokenizer import save_tokenizer

TOKENIZER_TYPES = ("gpt2", "llama")
MAX_TOKEN_CHARS = 1 << 10
_PREFIX = "tokenizer.ggml"
_SPECIAL_TOKENS: Mapping[str, str] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_tokenizer(
    architecture: str, metadata: Metadata, folder: Path, *, max_tokens: int
) -> None:
    """Write the tokenizer's files.

    Args:
        architecture: `general.architecture`.
        metadata: the file's keys.
        folder: where the files are written.
        max_tokens: rows of the embedding.

    Raises:
        SourceUnsupported: a key is missing, out of range or contradicts another one, or
            transformers cannot build the tokenizer; the message names the key.
    """
    vocabulary = read_vocabulary(metadata, max_tokens=max_tokens)
    settings = _settings(metadata, vocabulary["tokens"], vocabulary["tokenizer_type"])
    with unsupported_source():
        save_tokenizer(architecture, vocabulary, settings, folder, max_tokens=max_tokens)


def read_vocabulary(metadata: Metadata, *, max_tokens: int) -> dict[str, Any]:
    """Return the tokenizer's dict, in transformers' names."""
    tokens = _tokens(metadata, max_tokens)
    kind = metadata.string(f"{_PREFIX}.model")
    vocabulary: dict[str, Any] = {
        "tokenizer_type": metadata.choice(f"{_PREFIX}.model", TOKENIZER_TYPES, kind),
        "pre_tokenizer_type": metadata.optional_string(f"{_PREFIX}.pre"),
        "tokens": tokens,
        "merges": _merges(metadata, tokens),
        "scores": metadata.numbers(f"{_PREFIX}.scores", length=len(tokens)),
        "token_type": metadata.numbers(f"{_PREFIX}.token_type", length=len(tokens)),
    }
    needed = "merges" if kind == "gpt2" else "scores"
    if vocabulary["merges"] is None and vocabulary[needed] is None:
        raise metadata.error(f"{_PREFIX}.{needed}", None, f"the {needed} of a {kind} tokenizer")
    return {name: value for name, value in vocabulary.items() if value is not None}


def _tokens(metadata: Metadata, max_tokens: int) -> list[str]:
    key = f"{_PREFIX}.tokens"
    tokens = metadata.strings(key)
    if not tokens or len(tokens) > max_tokens:
        got = None if tokens is None else f"{len(tokens)} tokens"
        raise metadata.error(key, got, f"1 to {max_tokens} tokens, the rows of token_embd.weight")
    for index, token in enumerate(tokens):
        if not 0 < len(token) <= MAX_TOKEN_CHARS:
            raise metadata.error(
                f"{key}[{index}]", f"{len(token)} characters", f"1 to {MAX_TOKEN_CHARS}"
            )
    return tokens


def _merges(metadata: Metadata, tokens: list[str]) -> list[str] | None:
    """Return the merges, each of two tokens that are joined to a third."""
    key = f"{_PREFIX}.merges"
    merges = metadata.strings(key)
    known = set(tokens)
    for index, merge in enumerate(merges or ()):
        left, _, right = merge.partition(" ")
        if not (left in known and right in known and left + right in known):
            expected = "two tokens and a space between them, which together are a token"
            raise metadata.error(f"{key}[{index}]", merge, expected)
    return merges


def _settings(metadata: Metadata, tokens: list[str], kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
        "add_bos_token": metadata.boolean(f"{_PREFIX}.add_bos_token", default=kind == "llama"),
        "add_eos_token": metadata.boolean(f"{_PREFIX}.add_eos_token", default=False),
        "chat_template": metadata.optional_string("tokenizer.chat_template"),
    }
    for name, key in _SPECIAL_TOKENS.items():
        token = metadata.optional_integer(f"{_PREFIX}.{key}", minimum=0, maximum=len(tokens) - 1)
        settings[name] = None if token is None else tokens[token]
    return {name: value for name, value in settings.items() if value is not None}
