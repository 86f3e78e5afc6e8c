"""Choosing tokens: what a request asks for, and the draw over a batch's scores.

A draw is stateless: its uniform number is a hash of the request's seed and of the token's position.
So a request that was preempted and prefilled again, or that shares its batch with others, draws the
same tokens, and nothing has to be kept or freed per request.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = 1024  # top_p rarely keeps more; a full sort of 150k logits costs 50 times as much
UNIFORM_BITS = 48  # the largest draw, 1 - 2**-48, stays below 1 after rounding in a product


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request chooses its tokens.

    Attributes:
        temperature: 0 chooses the highest score.
        top_p: keeps the most likely tokens whose probabilities reach this sum.
        top_k: keeps this many most likely tokens; 0 keeps all.
        min_p: keeps tokens at least this likely, as a share of the most likely one; 0 keeps all.
        seed: the draws' seed; equal seeds give equal draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the highest score is chosen without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def restricted(self) -> bool:
        """Whether less than the whole vocabulary may be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw: the row of the scores, how, and at which position of its sequence."""

    row: int
    params: SamplingParams
    position: int

    @property
    def uniform(self) -> float:
        """The draw's number in [0, 1)."""
        text = f"{self.params.seed}:{self.position}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return float(int.from_bytes(digest) >> (64 - UNIFORM_BITS)) / (1 << UNIFORM_BITS)


def force_draws(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return the scores with each drawn token made its row's argmax, in place.

    Args:
        scores: [N, V], float32.
        draws: the rows to draw; other rows stay as they are.
    """
    if not draws:
        return scores
    rows = torch.tensor([draw.row for draw in draws], device=scores.device)  # [S]
    tokens = choose(scores[rows], draws)  # [S]
    scores[rows, tokens] = torch.inf
    return scores


def choose(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return the drawn token of each row, [S]; the scores are [S, V], one row for each draw."""
    temperatures = _column([draw.params.temperature for draw in draws], scores)  # [S, 1]
    # What float32 rounds to 0 would divide 0 by 0: not a number, and the last token of the list.
    temperatures.clamp_(min=torch.finfo(scores.dtype).tiny)
    peaks = scores.amax(-1, keepdim=True)  # [S, 1]
    # Subtracting the peak first keeps a tiny temperature from overflowing.
    probs = ((scores - peaks) / temperatures).softmax(-1)  # [S, V]
    _zero_excluded(probs, draws)
    # Summing in vocabulary order makes the draw independent of how ties are sorted.
    cumulative = probs.cumsum(-1, dtype=torch.float64)  # [S, V]
    uniforms = _column([draw.uniform for draw in draws], cumulative)  # [S, 1]
    targets = uniforms * cumulative[:, -1:]  # [S, 1]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)  # [S]
    return tokens.clamp_(max=scores.shape[-1] - 1)


def _zero_excluded(probs: Tensor, draws: Sequence[Draw]) -> None:
    restricted = [i for i, draw in enumerate(draws) if draw.params.restricted]
    if not restricted:
        return
    rows = torch.tensor(restricted, device=probs.device)  # [R]
    kept = probs[rows]  # [R, V]
    floors = _floors(kept, [draws[i].params for i in restricted])  # [R, 1]
    probs[rows] = kept.masked_fill_(kept < floors, 0)


def _floors(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the lowest probability that each row keeps, [R, 1]; ties with it are all kept."""
    n_vocab = probs.shape[-1]
    limits = [min(p.top_k, n_vocab) if p.top_k > 0 else n_vocab for p in params]
    n_candidates = min(n_vocab, max(CANDIDATES, *(k for k in limits if k < n_vocab), 0))
    floors, complete = _floors_within(probs, params, limits, n_candidates)
    if not complete:
        floors, _ = _floors_within(probs, params, limits, n_vocab)
    return floors


def _floors_within(
    probs: Tensor, params: Sequence[SamplingParams], limits: Sequence[int], n_candidates: int
) -> tuple[Tensor, bool]:
    values = probs.topk(n_candidates, dim=-1).values.double()  # [R, K]
    ranks = torch.arange(n_candidates, device=probs.device)  # [K]
    inside = ranks < torch.tensor(limits, device=probs.device).unsqueeze(-1)  # [R, K]
    inside &= values >= values[:, :1] * _column([p.min_p for p in params], values)
    values = values.masked_fill(~inside, 0)
    # Summed one after the other, so that how many zeros follow makes no difference.
    sums = values.cumsum(-1)  # [R, K]
    before = sums - values  # [R, K]
    n_vocab = probs.shape[-1]
    longer = torch.tensor([limit > n_candidates for limit in limits], device=probs.device)  # [R]
    more = longer & inside[:, -1]  # [R], goes on after the candidates
    all_of_them = [
        limit == n_vocab and p.min_p == 0 for limit, p in zip(limits, params, strict=True)
    ]
    whole = torch.tensor(all_of_them, device=probs.device)  # [R], known to sum to 1
    totals = torch.where(whole, 1.0, sums[:, -1]).unsqueeze(-1)  # [R, 1]
    top_p = _column([p.top_p for p in params], values)  # [R, 1]
    keep = inside & ((before < top_p * totals) | (ranks == 0))  # [R, K]
    floors = values.masked_fill(~keep, torch.inf).amin(-1, keepdim=True)  # [R, 1]
    complete = not bool((more & (keep[:, -1] | ~whole)).any())
    return floors.to(probs.dtype), complete


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)  # [len, 1]
