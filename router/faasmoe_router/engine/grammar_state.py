"""The position of one text in its grammar, which begins after the text's reasoning if it has any.

A model that reasons decides by its first token: the token that opens reasoning, or a token of the
grammar. Some prompts open the reasoning themselves. Until the token that closes it, nothing is
constrained; the grammar starts with the token after that.
"""

from __future__ import annotations

from faasmoe_router.engine.generation import ReasoningTokens
from faasmoe_router.engine.structured_output import GrammarMatcher


class GrammarState:
    """Advances by every output token of one text; used on the engine's thread only.

    Args:
        matcher: a matcher at the start of the grammar.
        reasoning: tokens of the reasoning that may precede it; None if none may.

    Attributes:
        matcher: position in the grammar.
        is_reasoning: whether the next token is not constrained, because the text is reasoning.
        n_accepted: number of output tokens so far.
        n_tokens_at_end: number of output tokens at which the grammar allows no further one; None
            until then.
    """

    def __init__(self, matcher: GrammarMatcher, reasoning: ReasoningTokens | None = None) -> None:
        self.matcher = matcher
        self.is_reasoning = reasoning is not None and reasoning.is_open
        self.n_accepted = 0
        self.n_tokens_at_end: int | None = None
        self._reasoning = reasoning

    @property
    def is_terminated(self) -> bool:
        """Whether the text is complete and no further token is allowed."""
        return self.n_tokens_at_end is not None

    @property
    def free_token(self) -> int | None:
        """The token that is allowed beside those of the grammar; None if there is none."""
        may_start = self._reasoning is not None and not self.n_accepted and not self.is_reasoning
        return self._reasoning.start if may_start and self._reasoning is not None else None

    def accept_token(self, token: int) -> None:
        """Advance by the next output token; ignored once the grammar has ended."""
        if self.is_terminated:
            return
        opens_reasoning = token == self.free_token
        self.n_accepted += 1
        if opens_reasoning:
            self.is_reasoning = True
        elif self.is_reasoning:
            self.is_reasoning = self._reasoning is None or token != self._reasoning.end
        else:
            self.matcher.accept_token(token)
            if self.matcher.is_terminated:
                self.n_tokens_at_end = self.n_accepted
