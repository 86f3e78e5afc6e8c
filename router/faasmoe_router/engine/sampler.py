"""Choosing tokens: what a request asks for, and the draw over a batch's scores.

A draw is stateless: its uniform number is a hash of the request's seed and of the token's position.
So a request that was preempted and prefilled again, or that shares its batch with others, draws the
same tokens, and nothing has to be kept or freed per request.

Biases: what a request adds to certain tokens' scores, and which tokens it forbids.

A token is forbidden by adding minus infinity, so that biases, bad words and end tokens that come
too early are one sparse addition for the whole batch.

Penalties for repetition: which tokens a sequence has, how often, and what that costs them.

As vLLM has it: the repetition penalty (of CTRL) regards prompt and output, presence and frequency
(of OpenAI) the output alone. What is kept for a sequence grows by a token at a time and holds each
different token once, so a step costs what the sequence has seen and not what the vocabulary holds.

Log-probabilities of chosen tokens and of the likeliest ones beside them.

They are of the model's own distribution, as OpenAI and vLLM give them: before temperature, biases,
penalties and grammars.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP_P_CANDIDATES = (
    1024  # top_p rarely keeps more; a full sort of 150k logits costs 50 times as much
)
UNIFORM_BITS = 48  # the largest draw, 1 - 2**-48, stays below 1 after rounding in a product


@dataclass(frozen=True, slots=True)
class DrawParams:
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
    def is_greedy(self) -> bool:
        """Whether the highest score is chosen without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def is_truncated(self) -> bool:
        """Whether less than the whole vocabulary may be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class RowDraw:
    """One token to draw: the row of the scores, how, and at which position of its sequence."""

    row: int
    params: DrawParams
    position: int

    @property
    def uniform(self) -> float:
        """The draw's number in [0, 1)."""
        text = f"{self.params.seed}:{self.position}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return float(int.from_bytes(digest) >> (64 - UNIFORM_BITS)) / (1 << UNIFORM_BITS)


def force_sampled_tokens(scores: Tensor, draws: Sequence[RowDraw]) -> Tensor:
    """Return the scores with each drawn token made its row's argmax, in place.

    Args:
        scores: [N, V], float32.
        draws: the rows to draw; other rows stay as they are.
    """
    if not draws:
        return scores
    rows = torch.tensor([draw.row for draw in draws], device=scores.device)  # [S]
    tokens = sample_tokens(scores[rows], draws)  # [S]
    scores[rows, tokens] = torch.inf
    return scores


def sample_tokens(scores: Tensor, draws: Sequence[RowDraw]) -> Tensor:
    """Return the drawn token of each row, [S]; the scores are [S, V], one row for each draw."""
    temperatures = _column([draw.params.temperature for draw in draws], scores)  # [S, 1]
    # What float32 rounds to 0 would divide 0 by 0: not a number, and the last token of the list.
    temperatures.clamp_(min=torch.finfo(scores.dtype).tiny)
    peaks = scores.amax(-1, keepdim=True)  # [S, 1]
    # Subtracting the peak first keeps a tiny temperature from overflowing.
    probs = ((scores - peaks) / temperatures).softmax(-1)  # [S, V]
    _zero_truncated(probs, draws)
    # Summing in vocabulary order makes the draw independent of how ties are sorted.
    cumulative = probs.cumsum(-1, dtype=torch.float64)  # [S, V]
    uniforms = _column([draw.uniform for draw in draws], cumulative)  # [S, 1]
    targets = uniforms * cumulative[:, -1:]  # [S, 1]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)  # [S]
    return tokens.clamp_(max=scores.shape[-1] - 1)


def _zero_truncated(probs: Tensor, draws: Sequence[RowDraw]) -> None:
    truncated = [i for i, draw in enumerate(draws) if draw.params.is_truncated]
    if not truncated:
        return
    rows = torch.tensor(truncated, device=probs.device)  # [R]
    row_probs = probs[rows]  # [R, V]
    floors = _probability_floors(row_probs, [draws[i].params for i in truncated])  # [R, 1]
    probs[rows] = row_probs.masked_fill_(row_probs < floors, 0)


def _probability_floors(probs: Tensor, params: Sequence[DrawParams]) -> Tensor:
    """Return the lowest probability that each row keeps, [R, 1]; ties with it are all kept."""
    n_vocab = probs.shape[-1]
    top_ks = [min(p.top_k, n_vocab) if p.top_k > 0 else n_vocab for p in params]
    n_candidates = min(n_vocab, max(TOP_P_CANDIDATES, *(k for k in top_ks if k < n_vocab), 0))
    floors, is_complete = _probability_floors_among(probs, params, top_ks, n_candidates)
    if not is_complete:
        floors, _ = _probability_floors_among(probs, params, top_ks, n_vocab)
    return floors


def _probability_floors_among(
    probs: Tensor, params: Sequence[DrawParams], top_ks: Sequence[int], n_candidates: int
) -> tuple[Tensor, bool]:
    values = probs.topk(n_candidates, dim=-1).values.double()  # [R, K]
    ranks = torch.arange(n_candidates, device=probs.device)  # [K]
    is_eligible = ranks < torch.tensor(top_ks, device=probs.device).unsqueeze(-1)  # [R, K]
    is_eligible &= values >= values[:, :1] * _column([p.min_p for p in params], values)
    values = values.masked_fill(~is_eligible, 0)
    # Summed one after the other, so that how many zeros follow makes no difference.
    sums = values.cumsum(-1)  # [R, K]
    preceding_sums = sums - values  # [R, K]
    n_vocab = probs.shape[-1]
    exceeds_candidates = torch.tensor(
        [limit > n_candidates for limit in top_ks], device=probs.device
    )  # [R]
    continues_after = exceeds_candidates & is_eligible[:, -1]  # [R], goes on after the candidates
    keeps_vocabulary = [
        limit == n_vocab and p.min_p == 0 for limit, p in zip(top_ks, params, strict=True)
    ]
    sums_to_one = torch.tensor(keeps_vocabulary, device=probs.device)  # [R], known to sum to 1
    totals = torch.where(sums_to_one, 1.0, sums[:, -1]).unsqueeze(-1)  # [R, 1]
    top_p = _column([p.top_p for p in params], values)  # [R, 1]
    is_kept = is_eligible & ((preceding_sums < top_p * totals) | (ranks == 0))  # [R, K]
    floors = values.masked_fill(~is_kept, torch.inf).amin(-1, keepdim=True)  # [R, 1]
    is_complete = not bool((continues_after & (is_kept[:, -1] | ~sums_to_one)).any())
    return floors.to(probs.dtype), is_complete


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)  # [len, 1]


FORBIDDEN = -torch.inf


@dataclass(frozen=True, slots=True)
class LogitBias:
    """What a request asks for.

    Attributes:
        added: tokens, and what is added to their scores.
        allowed: the only tokens that may be generated; None allows all.
        bad_words: sequences of tokens that may not be generated.
    """

    biases: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def is_neutral(self) -> bool:
        """Whether it changes nothing."""
        return not self.biases and self.allowed_token_ids is None and not self.bad_words_token_ids

    @property
    def max_bad_word_length(self) -> int:
        """The tokens of the longest of the bad words."""
        return max(map(len, self.bad_words_token_ids), default=0)

    def adjustments(self, output: Sequence[int]) -> list[tuple[int, float]]:
        """Return what is added to which tokens after an output, of which the end will do."""
        adjustments = list(self.biases)
        for *prefix, last in self.bad_words_token_ids:
            if not prefix or list(output[-len(prefix) :]) == prefix:
                adjustments.append((last, FORBIDDEN))
        return adjustments


@dataclass(frozen=True, slots=True)
class RowBias:
    """One row of the scores, with what is done to it."""

    row: int
    adjustments: Sequence[tuple[int, float]]
    allowed_token_ids: tuple[int, ...] | None = None


def apply_logit_bias(scores: Tensor, rows: Sequence[RowBias]) -> None:
    """Apply the biases to the scores, [N, V], in place; other rows stay as they are."""
    for row in rows:
        if row.allowed_token_ids is not None:
            _mask_all_but(scores[row.row], row.allowed_token_ids)
    adjustments = [(row.row, token, value) for row in rows for token, value in row.adjustments]
    if not adjustments:
        return
    index, tokens, values = zip(*adjustments, strict=True)
    positions = torch.tensor([index, tokens], device=scores.device).unbind()  # [C] each
    added = torch.tensor(values, dtype=scores.dtype, device=scores.device)  # [C]
    scores.index_put_(positions, added, accumulate=True)


def _mask_all_but(scores: Tensor, allowed: Sequence[int]) -> None:
    ids = torch.tensor(allowed, device=scores.device)  # [A]
    allowed_scores = scores[ids]  # [A]
    scores.fill_(FORBIDDEN)
    scores[ids] = allowed_scores


@dataclass(frozen=True, slots=True)
class Penalties:
    """What a request asks for.

    Attributes:
        presence: taken from the score of every token that was generated.
        frequency: taken from a token's score each time that it was generated.
        repetition: divides the positive and multiplies the negative scores of tokens in the prompt
            or the output; 1 changes nothing.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    @property
    def is_neutral(self) -> bool:
        """Whether they change nothing."""
        return self.presence == 0 and self.frequency == 0 and self.repetition == 1


class TokenCounts:
    """The different tokens of one sequence, and how often each was generated.

    Args:
        prompt_ids: tokens that count as seen and not as generated.
        n_output: the most tokens that may be generated.
    """

    def __init__(self, prompt_token_ids: Iterable[int], *, max_output_tokens: int) -> None:
        self._slot_by_token = {
            token: slot for slot, token in enumerate(dict.fromkeys(prompt_token_ids))
        }
        capacity = len(self._slot_by_token) + max_output_tokens
        self._ids = torch.empty(capacity, dtype=torch.int64)
        self._counts = torch.zeros(capacity)
        self._ids[: len(self._slot_by_token)] = torch.tensor(
            list(self._slot_by_token), dtype=torch.int64
        )

    def __len__(self) -> int:
        return len(self._slot_by_token)

    def add_tokens(self, tokens: Iterable[int]) -> None:
        """Count tokens that were generated."""
        for token in tokens:
            slot = self._slot_by_token.setdefault(token, len(self._slot_by_token))
            self._ids[slot] = token
            self._counts[slot] += 1

    @property
    def token_ids(self) -> Tensor:
        """The different tokens, [U]."""
        return self._ids[: len(self)]

    @property
    def counts(self) -> Tensor:
        """How often each was generated, [U]."""
        return self._counts[: len(self)]


@dataclass(frozen=True, slots=True)
class RowPenalties:
    """One row of the scores, with what is taken from it."""

    row: int
    penalties: Penalties
    token_counts: TokenCounts


def apply_penalties(scores: Tensor, rows: Sequence[RowPenalties]) -> None:
    """Take the penalties from the scores, [N, V], in place; other rows stay as they are."""
    if not rows:
        return
    device = scores.device
    ids = torch.cat([row.token_counts.token_ids for row in rows]).to(device)  # [E]
    counts = torch.cat([row.token_counts.counts for row in rows]).to(device)  # [E]
    penalties = torch.tensor([_penalty_columns(row) for row in rows], dtype=torch.float64)  # [R, 4]
    n_each = torch.tensor([len(row.token_counts) for row in rows])  # [R]
    index, presence, frequency, repetition = (
        penalties.repeat_interleave(n_each, dim=0).to(device).unbind(1)  # [E] each
    )
    positions = index.long(), ids
    values = scores[positions].double()  # [E]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts + presence * (counts > 0)
    scores[positions] = values.to(scores.dtype)


def _penalty_columns(row: RowPenalties) -> tuple[float, float, float, float]:
    penalties = row.penalties
    return row.row, penalties.presence, penalties.frequency, penalties.repetition


MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SampledLogprob:
    """A chosen token's log-probability.

    Attributes:
        token: the token.
        logprob: its log-probability.
        top: the likeliest tokens with theirs, as many as were asked for, likeliest first.
    """

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class LogprobQueue:
    """One sequence's log-probabilities on their way from the engine's thread to the event loop.

    An entry is put for a token before the token is delivered, and taken when it is: the log holds
    no more than what is under way.
    """

    def __init__(self, n_top: int) -> None:
        self.n_top = n_top
        self._entries: deque[SampledLogprob] = deque()

    def append(self, entry: SampledLogprob) -> None:
        """Add the next token's."""
        self._entries.append(entry)

    def discard_last(self) -> None:
        """Forget the newest, whose token was not delivered: it is chosen once more."""
        self._entries.pop()

    def pop_first(self) -> SampledLogprob:
        """Return the oldest that was not taken yet."""
        return self._entries.popleft()


def compute_logprobs(scores: Tensor, chosen: Tensor, n_top: Sequence[int]) -> list[SampledLogprob]:
    """Return the log-probability of each row's chosen token.

    Args:
        scores: the model's own, [R, V].
        chosen: the tokens, [R].
        n_top: how many of the likeliest tokens each row wants.
    """
    totals = scores.logsumexp(-1, keepdim=True)  # [R, 1]
    chosen_logprobs = (scores.gather(-1, chosen.unsqueeze(-1)) - totals).squeeze(-1).tolist()
    n_most = min(max(n_top), scores.shape[-1])
    values, tokens = scores.topk(n_most, dim=-1)  # [R, K] each
    tops = zip(tokens.tolist(), (values - totals).tolist(), strict=True)
    return [
        SampledLogprob(token, logprob, tuple(zip(ids[:n], logprobs[:n], strict=True)))
        for token, logprob, (ids, logprobs), n in zip(
            chosen.tolist(), chosen_logprobs, tops, n_top, strict=True
        )
    ]
