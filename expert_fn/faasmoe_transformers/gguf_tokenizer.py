"""Builds the tokenizer that the keys of a GGUF file describe, as transformers does.

The file is not read here: the caller has read and bounded its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer

from faasmoe_transformers.errors import UnsupportedModel


def save_tokenizer(
    architecture: str, vocabulary: Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> None:
    """Write a tokenizer as `save_pretrained` does.

    Args:
        architecture: `general.architecture` of the file.
        vocabulary: transformers' dict: `tokenizer_type`, `pre_tokenizer_type`, `tokens`, `merges`,
            `scores`, `token_type`.
        settings: arguments of the tokenizer: special tokens, `add_bos_token`, `chat_template`.
        folder: where the files are written.

    Raises:
        UnsupportedModel: transformers cannot build it.
    """
    try:
        backend, more_settings = convert_gguf_tokenizer(architecture, dict(vocabulary))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, **{**settings, **more_settings}
        )
        tokenizer.save_pretrained(folder)
    except Exception as error:  # of the tokenizers library, by what a file contains
        raise UnsupportedModel(
            f"tokenizer: rejected by transformers: {type(error).__name__}: {error}"
        ) from error
