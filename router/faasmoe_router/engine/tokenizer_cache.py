"""Tokenizers by the content of their files, so that routers of equal models share one.

A zygote loads the tokenizer of a store before it forks a router; fine-tunes of one checkpoint, and
a router that starts again, find it there. They share its pages, and start without parsing it: 15 MB
and 0.2 s for a vocabulary of 49,152. Without a zygote, or if the files have changed, a router loads
its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.file_contents import CONTENTS, Content

MAX_TOKENIZERS = 4
WITHOUT_TOKENIZER = frozenset({"generation_config.json"})  # of the files beside it


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """Load a tokenizer; raises whatever the parser of a broken file does."""
    return ModelTokenizer(AutoTokenizer.from_pretrained(folder))


class TokenizerCache:
    """The tokenizers that were used last.

    Args:
        load: loads the tokenizer of a folder.
        size: how many are kept.
    """

    def __init__(
        self,
        load: Callable[[Path], ModelTokenizer] = load_tokenizer,
        *,
        size: int = MAX_TOKENIZERS,
    ) -> None:
        self._load = load
        self._size = size
        self._tokenizers: dict[Content, ModelTokenizer] = {}  # the one used last is the last

    def get(self, folder: Path) -> ModelTokenizer:
        """Return the tokenizer of a folder; raises what its parser does, and OSError."""
        content = CONTENTS.of_folder(folder, without=WITHOUT_TOKENIZER)
        tokenizer = self._tokenizers.pop(content, None) or self._load(folder)
        self._tokenizers[content] = tokenizer
        while len(self._tokenizers) > self._size:
            del self._tokenizers[next(iter(self._tokenizers))]
        return tokenizer


TOKENIZERS = TokenizerCache()
"""This process's; routers have what their zygote had."""
