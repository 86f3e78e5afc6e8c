"""The vocabulary as bytes: what each token stands for, byte by byte, and llguidance's view of it.

Made when something first needs it (a second for 150,000 tokens): a server whose clients ask neither
for log-probabilities nor for grammars never does.
"""

import threading
from collections.abc import Sequence

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from faasmoe_router.errors import ConstraintError


class Vocabulary:
    """A model's tokens as bytes; safe to use from several threads.

    Args:
        backend: the tokenizer.
        n_tokens: the model's scores for one position; it may have more than the tokenizer has
            tokens.
        eos_ids: the tokens that end a text.
    """

    def __init__(self, backend: Tokenizer, *, n_tokens: int, eos_ids: Sequence[int]) -> None:
        self._backend = backend
        self._n_tokens = max(n_tokens, backend.get_vocab_size(with_added_tokens=True))
        self._eos_ids = list(eos_ids)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    @property
    def tokens(self) -> LLTokenizer:
        """The vocabulary as llguidance has it; raises ConstraintError if it has none such."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def prepare(self) -> None:
        """Make it now, which takes a while; raises ConstraintError."""
        _ = self.tokens

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text; a special token's are its name."""
        text: bytes = self.tokens.decode_bytes([token])
        return text

    def _make(self) -> LLTokenizer:
        try:
            return LLTokenizer(
                self._backend.to_str(), n_vocab=self._n_tokens, eos_token=self._eos_ids or None
            )
        except (ValueError, TypeError) as error:
            raise ConstraintError(
                f"the model's tokenizer cannot be constrained: {error}"
            ) from error
