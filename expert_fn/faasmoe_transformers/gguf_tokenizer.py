"""Builds the tokenizer that the keys of a GGUF file describe, as transformers does.

The file is not read here: the caller has read and bounded its keys.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from faasmoe_transformers.errors import UnsupportedModel

logger = logging.getLogger(__name__)

MAX_SHOWN_CHARS = 40
_GPT2_SPLITS = (None, "default", "gpt-2")


def save_tokenizer(
    architecture: str,
    vocabulary: Mapping[str, Any],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    max_tokens: int,
) -> None:
    """Write a tokenizer as `save_pretrained` does.

    Args:
        architecture: `general.architecture` of the file.
        vocabulary: transformers' dict: `tokenizer_type`, `pre_tokenizer_type`, `tokens`, `merges`,
            `scores`, `token_type`.
        settings: arguments of the tokenizer: special tokens, `add_bos_token`, `chat_template`.
        folder: where the files are written.
        max_tokens: tokens that the model has.

    Raises:
        UnsupportedModel: transformers cannot build it, or builds one with more tokens.
    """
    from transformers.integrations.gguf import (  # they import six tokenizers
        convert_gguf_tokenizer,
        gguf_tokenizer_mapping,
    )

    split = vocabulary.get("pre_tokenizer_type")
    if split not in (*_GPT2_SPLITS, *gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS):
        logger.warning(
            "tokenizer.ggml.pre: got %r, which transformers does not know: text is split as GPT-2 "
            "does, and tokens may differ from the model's",
            str(split)[:MAX_SHOWN_CHARS],
        )
    try:
        backend, more_settings = convert_gguf_tokenizer(architecture, dict(vocabulary))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_without_tokens_beyond(backend, max_tokens),
            **{**settings, **more_settings},
        )
        tokenizer.save_pretrained(folder)
    except Exception as error:  # of the tokenizers library, by what a file contains
        raise UnsupportedModel(
            f"tokenizer: rejected by transformers: {type(error).__name__}: {error}"
        ) from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= max_tokens:
        raise UnsupportedModel(
            f"tokenizer: got token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"expected at most {max_tokens - 1}: transformers adds a special token that it does "
            "not find in the vocabulary"
        )


def _without_tokens_beyond(backend: Any, max_tokens: int) -> Any:
    """Return a tokenizer without the special tokens that its class added to the vocabulary.

    GPT-2's class adds `<|endoftext|>` to vocabularies of models that do not have it.
    """
    state = json.loads(backend.to_str())
    known = [token for token in state["added_tokens"] if token["id"] < max_tokens]
    if len(known) == len(state["added_tokens"]):
        return backend
    state["added_tokens"] = known
    return type(backend).from_str(json.dumps(state))
