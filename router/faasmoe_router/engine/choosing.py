"""How one request's tokens are chosen."""

from dataclasses import dataclass, field

from faasmoe_router.engine.bias import Bias
from faasmoe_router.engine.grammar import Grammar
from faasmoe_router.engine.penalties import Penalties
from faasmoe_router.engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Choosing:
    """How a request's tokens are chosen.

    Attributes:
        sampling: the draw.
        penalties: what repetition costs.
        bias: which tokens are favoured or forbidden.
        n_logprobs: how many of the likeliest tokens are told with each token; None tells nothing.
        grammar: what the text is held to.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    penalties: Penalties = field(default_factory=Penalties)
    bias: Bias = field(default_factory=Bias)
    n_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def plain(self) -> bool:
        """Whether the highest of the model's own scores is chosen and nothing is told of it."""
        return (
            self.sampling.greedy
            and self.penalties.neutral
            and self.bias.neutral
            and self.n_logprobs is None
            and self.grammar is None
        )
