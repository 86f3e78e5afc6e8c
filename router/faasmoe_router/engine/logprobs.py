"""Log-probabilities of chosen tokens and of the likeliest ones beside them.

They are of the model's own distribution, as OpenAI and vLLM give them: before temperature, biases,
penalties and grammars.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log-probability.

    Attributes:
        token: the token.
        logprob: its log-probability.
        top: the likeliest tokens with theirs, as many as were asked for, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class LogprobLog:
    """One sequence's log-probabilities on their way from the engine's thread to the event loop.

    An entry is put for a token before the token is delivered, and taken when it is: the log holds
    no more than what is under way.
    """

    def __init__(self, n_top: int) -> None:
        self.n_top = n_top
        self._entries: deque[TokenLogprob] = deque()

    def put(self, entry: TokenLogprob) -> None:
        """Add the next token's."""
        self._entries.append(entry)

    def take_back(self) -> None:
        """Forget the newest, whose token was not delivered: it is chosen once more."""
        self._entries.pop()

    def take(self) -> TokenLogprob:
        """Return the oldest that was not taken yet."""
        return self._entries.popleft()


def log_probabilities(scores: Tensor, chosen: Tensor, n_top: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probability of each row's chosen token.

    Args:
        scores: the model's own, [R, V].
        chosen: the tokens, [R].
        n_top: how many of the likeliest tokens each row wants.
    """
    totals = scores.logsumexp(-1, keepdim=True)  # [R, 1]
    own = (scores.gather(-1, chosen.unsqueeze(-1)) - totals).squeeze(-1).tolist()
    n_most = min(max(n_top), scores.shape[-1])
    values, tokens = scores.topk(n_most, dim=-1)  # [R, K] each
    tops = zip(tokens.tolist(), (values - totals).tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[:n], logprobs[:n], strict=True)))
        for token, logprob, (ids, logprobs), n in zip(
            chosen.tolist(), own, tops, n_top, strict=True
        )
    ]
