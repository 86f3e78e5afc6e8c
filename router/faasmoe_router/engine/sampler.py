"""Sampling over a batch's scores: logit bias, penalties, random draws and log-probabilities.

Requests carry dataclasses (`LogitBias`, `Penalties`, `DrawParams`); functions apply them to rows of
the batch's [N, V] scores, each as one sparse operation for all rows. Knows nothing of requests,
scheduling or the batching backend.

Draws are stateless: the uniform number is a hash of the request's seed and the token's position. A
request that is preempted and prefilled again, or batched with others, draws the same tokens, and no
generator has to be kept or freed.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from faasmoe_kernels import KernelLibrary
from faasmoe_kernels.router_ops import Draw, TokenDrawer

FORBIDDEN = -torch.inf
FORCED = torch.inf
MAX_TOP_LOGPROBS = 20
# top_p rarely keeps more tokens; a full sort of 150k logits costs 50 times as much.
TOP_P_CANDIDATES = 1024
UNIFORM_BITS = 48  # the largest draw, 1 - 2**-48, stays below 1 after rounding in a product


@dataclass(frozen=True, slots=True)
class LogitBias:
    """The token biases and constraints of a request.

    A token is forbidden by adding minus infinity, so logit biases, bad words and stop tokens before
    `min_tokens` are one addition.

    Attributes:
        biases: (token id, value added to its score).
        allowed_token_ids: the only tokens that may be generated; None allows all.
        bad_words_token_ids: token sequences that may not be generated.
    """

    biases: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def is_neutral(self) -> bool:
        """Whether it leaves all scores unchanged."""
        return not self.biases and self.allowed_token_ids is None and not self.bad_words_token_ids

    @property
    def max_bad_word_length(self) -> int:
        """Length of the longest bad word, in tokens; 0 without bad words."""
        return max(map(len, self.bad_words_token_ids), default=0)

    def adjustments(self, output: Sequence[int]) -> list[tuple[int, float]]:
        """Return (token id, value to add to its score) for the next token.

        Args:
            output: output tokens so far; the last `max_bad_word_length - 1` suffice.
        """
        adjustments = list(self.biases)
        for *prefix, last in self.bad_words_token_ids:
            if not prefix or list(output[-len(prefix) :]) == prefix:
                adjustments.append((last, FORBIDDEN))
        return adjustments


@dataclass(frozen=True, slots=True)
class RowBias:
    """The bias of one row of the scores; see `LogitBias.adjustments`."""

    row: int
    adjustments: Sequence[tuple[int, float]]
    allowed_token_ids: tuple[int, ...] | None = None


def apply_logit_bias(scores: Tensor, rows: Sequence[RowBias]) -> None:
    """Apply biases to the given rows of the scores, [N, V], in place."""
    for row in rows:
        if row.allowed_token_ids is not None:
            _mask_all_but(scores[row.row], row.allowed_token_ids)
    adjustments = [(row.row, token, value) for row in rows for token, value in row.adjustments]
    if not adjustments:
        return
    row_ids, tokens, values = zip(*adjustments, strict=True)
    positions = torch.tensor([row_ids, tokens], device=scores.device).unbind()  # [C] each
    added = torch.tensor(values, dtype=scores.dtype, device=scores.device)  # [C]
    scores.index_put_(positions, added, accumulate=True)


def _mask_all_but(scores: Tensor, allowed: Sequence[int]) -> None:
    ids = torch.tensor(allowed, device=scores.device)  # [A]
    allowed_scores = scores[ids]  # [A]
    scores.fill_(FORBIDDEN)
    scores[ids] = allowed_scores


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalties of a request, as in vLLM.

    The repetition penalty (CTRL) counts prompt and output, presence and frequency penalties
    (OpenAI) the output alone.

    Attributes:
        presence: subtracted from the score of every generated token.
        frequency: subtracted from a token's score once for each time it was generated.
        repetition: divides positive and multiplies negative scores of tokens in the prompt or the
            output; 1 changes nothing.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    @property
    def is_neutral(self) -> bool:
        """Whether they leave all scores unchanged."""
        return self.presence == 0 and self.frequency == 0 and self.repetition == 1


class TokenCounts:
    """The distinct tokens of one sequence and how often each was generated.

    Grows with the output, so a step costs in proportion to the tokens seen and not to the
    vocabulary.

    Args:
        prompt_token_ids: tokens that count as seen but not as generated.
        max_output_tokens: maximum number of generated tokens; sizes the buffers.
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
        """Count generated tokens."""
        for token in tokens:
            slot = self._slot_by_token.setdefault(token, len(self._slot_by_token))
            self._ids[slot] = token
            self._counts[slot] += 1

    @property
    def token_ids(self) -> Tensor:
        """The distinct tokens, [U], int64."""
        return self._ids[: len(self)]

    @property
    def counts(self) -> Tensor:
        """How often each was generated, [U], float32."""
        return self._counts[: len(self)]


@dataclass(frozen=True, slots=True)
class RowPenalties:
    """The penalties of one row of the scores."""

    row: int
    penalties: Penalties
    token_counts: TokenCounts


def apply_penalties(scores: Tensor, rows: Sequence[RowPenalties]) -> None:
    """Apply penalties to the given rows of the scores, [N, V], in place."""
    if not rows:
        return
    device = scores.device
    ids = torch.cat([row.token_counts.token_ids for row in rows]).to(device)  # [E]
    counts = torch.cat([row.token_counts.counts for row in rows]).to(device)  # [E]
    penalties = torch.tensor([_penalty_columns(row) for row in rows], dtype=torch.float64)  # [R, 4]
    n_distinct = torch.tensor([len(row.token_counts) for row in rows])  # [R]
    row_ids, presence, frequency, repetition = (
        penalties.repeat_interleave(n_distinct, dim=0).to(device).unbind(1)  # [E] each
    )
    positions = row_ids.long(), ids
    values = scores[positions].double()  # [E]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts + presence * (counts > 0)
    scores[positions] = values.to(scores.dtype)


def _penalty_columns(row: RowPenalties) -> tuple[float, float, float, float]:
    penalties = row.penalties
    return row.row, penalties.presence, penalties.frequency, penalties.repetition


@dataclass(frozen=True, slots=True)
class DrawParams:
    """Temperature, truncation and seed of a request's draws.

    Attributes:
        temperature: divides the scores; 0 selects the highest score.
        top_p: keeps the most likely tokens up to this cumulative probability.
        top_k: keeps this many most likely tokens; 0 keeps all.
        min_p: keeps tokens with at least this fraction of the highest probability; 0 keeps all.
        seed: seed of the draws; equal seeds give equal draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the highest score is selected without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def is_truncated(self) -> bool:
        """Whether only part of the vocabulary may be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class RowDraw:
    """One token to draw.

    Attributes:
        row: row of the scores.
        params: how to draw.
        position: position of the token in its sequence, prompt included.
    """

    row: int
    params: DrawParams
    position: int

    @property
    def uniform(self) -> float:
        """The uniform number of the draw, in [0, 1)."""
        text = f"{self.params.seed}:{self.position}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return float(int.from_bytes(digest) >> (64 - UNIFORM_BITS)) / (1 << UNIFORM_BITS)

    def native(self) -> Draw:
        """Return the draw as the kernel library takes it."""
        params = self.params
        top_p, min_p = params.top_p, params.min_p
        return Draw(self.row, params.top_k, top_p, min_p, self.uniform, params.temperature)


def force_sampled_tokens(
    scores: Tensor, draws: Sequence[RowDraw], draw_natively: NativeDrawer | None = None
) -> Tensor:
    """Draw tokens and make each the argmax of its row, in place; return the scores.

    Args:
        scores: [N, V], float32.
        draws: the rows to draw from; other rows are unchanged.
        draw_natively: draws from scores on a CPU; if omitted, torch does.
    """
    if not draws:
        return scores
    rows = torch.tensor([draw.row for draw in draws], device=scores.device)  # [S]
    if draw_natively is not None and scores.device.type == "cpu" and scores.is_contiguous():
        tokens = draw_natively(scores, draws)  # [S]
    else:
        tokens = sample_tokens(scores[rows], draws)  # [S]
    scores[rows, tokens] = torch.inf
    return scores


class NativeDrawer:
    """Draws tokens by the kernel library, as a step that is one native call does.

    The same request draws the same tokens in either, whatever is in its batch.

    Args:
        library: the kernel library.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._draw = TokenDrawer(library)

    def __call__(self, scores: Tensor, draws: Sequence[RowDraw]) -> Tensor:
        """Return the drawn token of each draw, int64 [S], from scores, float32 [N, V]."""
        n_rows, n_vocab = scores.shape
        tokens = torch.zeros(n_rows, dtype=torch.int32)  # [N]
        self._draw(
            scores.data_ptr(),
            n_rows,
            n_vocab,
            [draw.native() for draw in draws],
            tokens=tokens.data_ptr(),
            n_threads=torch.get_num_threads(),
        )
        return tokens[[draw.row for draw in draws]].long()


def sample_tokens(scores: Tensor, draws: Sequence[RowDraw]) -> Tensor:
    """Return the drawn token of each row, [S].

    Args:
        scores: [S, V], one row for each draw.
        draws: how to draw from each row; `RowDraw.row` is ignored.
    """
    temperatures = _column([draw.params.temperature for draw in draws], scores)  # [S, 1]
    # A temperature that float32 rounds to 0 would give 0 / 0 = NaN and select the last token.
    temperatures.clamp_(min=torch.finfo(scores.dtype).tiny)
    peaks = scores.amax(-1, keepdim=True)  # [S, 1]
    # Subtracting the peak first avoids overflow at tiny temperatures.
    probs = ((scores - peaks) / temperatures).softmax(-1)  # [S, V]
    _zero_truncated(probs, draws)
    # Summing in vocabulary order makes the draw independent of the sort order of ties.
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
    """Return the lowest probability that each row keeps, [R, 1]; all ties with it are kept."""
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
    """Return the floors, [R, 1], and whether the top `n_candidates` suffice to determine them."""
    values = probs.topk(n_candidates, dim=-1).values.double()  # [R, K]
    ranks = torch.arange(n_candidates, device=probs.device)  # [K]
    is_eligible = ranks < torch.tensor(top_ks, device=probs.device).unsqueeze(-1)  # [R, K]
    is_eligible &= values >= values[:, :1] * _column([p.min_p for p in params], values)
    values = values.masked_fill(~is_eligible, 0)
    # A sequential sum does not depend on the number of trailing zeros.
    sums = values.cumsum(-1)  # [R, K]
    preceding_sums = sums - values  # [R, K]
    n_vocab = probs.shape[-1]
    exceeds_candidates = torch.tensor(
        [limit > n_candidates for limit in top_ks], device=probs.device
    )  # [R]
    continues_after = exceeds_candidates & is_eligible[:, -1]  # [R], beyond the candidates
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


@dataclass(frozen=True, slots=True)
class SampledLogprob:
    """The log-probability of a sampled token.

    Attributes:
        token: the token.
        logprob: its log-probability.
        top_logprobs: (token, log-probability) of the most likely tokens, most likely first, as many
            as were requested.
    """

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class LogprobQueue:
    """Log-probabilities of one sequence in transit from the engine's thread to the event loop.

    An entry is appended before its token is delivered and popped when the token is processed, so
    the queue holds only tokens in transit.

    Args:
        n_top: number of most likely tokens in each entry.
        token_ids: tokens in each entry instead of the most likely ones; empty for those.
    """

    def __init__(self, n_top: int, token_ids: Sequence[int] = ()) -> None:
        self.n_top = n_top
        self.token_ids = token_ids
        self._entries: deque[SampledLogprob] = deque()

    def append(self, entry: SampledLogprob) -> None:
        """Append the entry of the next token."""
        self._entries.append(entry)

    def discard_last(self) -> None:
        """Remove the newest entry, whose token was not delivered and is sampled again."""
        self._entries.pop()

    def pop_first(self) -> SampledLogprob:
        """Remove and return the oldest entry."""
        return self._entries.popleft()


def compute_logprobs(
    scores: Tensor,
    chosen: Tensor,
    n_top: Sequence[int],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> list[SampledLogprob]:
    """Return the log-probability of each row's sampled token.

    As in OpenAI and vLLM they are those of the model's own distribution, before temperature,
    biases, penalties and grammars.

    Args:
        scores: unmodified scores of the model, [R, V].
        chosen: the sampled tokens, [R].
        n_top: number of most likely tokens to report for each row.
        token_ids: the tokens to report beside the sampled one instead, where a row has any.
    """
    totals = scores.logsumexp(-1, keepdim=True)  # [R, 1]
    chosen_logprobs = (scores.gather(-1, chosen.unsqueeze(-1)) - totals).squeeze(-1).tolist()
    n_candidates = min(max(n_top), scores.shape[-1])
    values, tokens = scores.topk(n_candidates, dim=-1)  # [R, K] each
    tops = zip(tokens.tolist(), (values - totals).tolist(), strict=True)
    entries = [
        SampledLogprob(token, logprob, tuple(zip(ids[:n], logprobs[:n], strict=True)))
        for token, logprob, (ids, logprobs), n in zip(
            chosen.tolist(), chosen_logprobs, tops, n_top, strict=True
        )
    ]
    for row, requested in enumerate(token_ids or ()):
        if requested:
            ids = list(dict.fromkeys((entries[row].token, *requested)))
            logprobs = (scores[row, ids] - totals[row]).tolist()  # [len(ids)]
            entries[row] = replace(
                entries[row], top_logprobs=tuple(zip(ids, logprobs, strict=True))
            )
    return entries
