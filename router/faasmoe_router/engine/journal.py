"""What it takes to repeat the output of a request in another process: its tokens.

Text, stop conditions and tool calls follow from the tokens; what does not is kept with them. A
journal is a sequence of entries in the order of the outputs, one JSON array per line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_router.engine.sampler import SampledLogprob


class JournalError(Exception):
    """A journal that this router cannot read."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The tokens behind one output of a sequence.

    Attributes:
        token_ids: the tokens, including those of the prompt that it was given one by one.
        logprobs: their log-probabilities; empty if they were not requested.
        ends_grammar: whether the last one completed the text that its grammar allows.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[SampledLogprob, ...] = ()
    ends_grammar: bool = False


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One output of a request.

    Attributes:
        index: the sequence of the request.
        progress: the tokens behind it.
        n_cached_tokens: prompt tokens found in the prefix cache, with the first output.
        n_cache_written_tokens: prompt tokens that the prefix cache has gained, with the same.
    """

    index: int
    progress: Progress
    n_cached_tokens: int | None = None
    n_cache_written_tokens: int = 0

    def dumps(self) -> bytes:
        """Return the line of this entry."""
        progress = self.progress
        logprobs = [[p.token, p.logprob, p.top_logprobs] for p in progress.logprobs]
        value = [
            self.index,
            progress.token_ids,
            self.n_cached_tokens,
            int(progress.ends_grammar),
            *([logprobs] if logprobs or self.n_cache_written_tokens else []),
            *([self.n_cache_written_tokens] if self.n_cache_written_tokens else []),
        ]
        return json.dumps(value, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> JournalEntry:
        """Return the entry of a line; raises JournalError."""
        try:
            index, token_ids, n_cached, ends_grammar, *rest = json.loads(line)
            logprobs = tuple(_to_logprob(value) for value in (rest[0] if rest else ()))
            tokens = tuple(int(token) for token in token_ids)
            progress = Progress(tokens, logprobs, bool(ends_grammar))
            n_written = int(rest[1]) if len(rest) > 1 else 0
            return cls(int(index), progress, None if n_cached is None else int(n_cached), n_written)
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise JournalError(f"the journal has a line that is no entry: {line[:80]!r}") from error


def _to_logprob(value: Sequence[Any]) -> SampledLogprob:
    token, logprob, top_logprobs = value
    top = tuple((int(t), float(p)) for t, p in top_logprobs)
    return SampledLogprob(int(token), float(logprob), top)
