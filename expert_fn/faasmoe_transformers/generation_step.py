"""A generation step around one native call: batch, layers, scores and tokens.

Replaces `_generation_step` of transformers' batch processor where a program computes the whole
model: what remains of Python is the embedding, and the sampler where scores are edited before a
token is chosen. Each call that releases the interpreter may wait for it afterwards, behind whatever
the event loop does; a sampler of many small ones would wait many times in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from faasmoe_kernels.router_ops import AttentionBatch, Draw, HighestScores, ScorePlaces
from faasmoe_transformers.batch_inputs import BatchInputs
from faasmoe_transformers.rotary_tables import RotaryTable


class ScoresSampler(Protocol):
    """Chooses tokens by scores."""

    def draws(self) -> Sequence[Draw] | None:
        """Return what is drawn from the planned rows' scores as they are.

        Tokens of rows without a draw are the argmax. None: scores have to be edited first.
        """

    def accept_drawn(self, peaks: Sequence[float]) -> None:
        """Take note that the tokens were chosen as `draws` tells.

        Args:
            peaks: the highest score of each row; NaN if one is.
        """

    def sample(self, scores: Tensor) -> Tensor:
        """Return scores [N, V] whose argmax is each row's token; may modify them in place."""


class ScoringProgram(Protocol):
    """Computes a model on a batch.

    Attributes:
        vocabulary: scores V per row.
    """

    vocabulary: int

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the first layer's input, float32 [1, T, H], of tokens [1, T]."""

    def run_step(
        self,
        hidden: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        groups: Sequence[AttentionBatch],
        scores: ScorePlaces | None,
    ) -> None:
        """Run all layers on hidden states [T, H], and compute scores."""


class GenerationStep:
    """Computes a prepared batch, and writes its tokens where transformers reads them.

    Args:
        program: computes the model.
        batch: the batch.
        tables: angles of each rotary call.
        sampler: chooses tokens.
        highest_scores: finds the argmax of scores that a sampler has modified.
        output_ids: transformers' static memory of a batch's tokens, int32.

    Attributes:
        before_run: called once a batch is prepared; what other threads do then has the interpreter
            while the batch is computed.
    """

    def __init__(
        self,
        program: ScoringProgram,
        batch: BatchInputs,
        tables: Sequence[RotaryTable],
        sampler: ScoresSampler,
        highest_scores: HighestScores,
        output_ids: Tensor,
    ) -> None:
        self.before_run: Callable[[], object] = lambda: None
        self._program = program
        self._batch = batch
        self._tables = tables
        self._sampler = sampler
        self._highest_scores = highest_scores
        self._output_ids = output_ids
        self._peaks = np.empty(output_ids.shape[-1], dtype=np.float32)
        self._scores = torch.empty(0, program.vocabulary)  # [N, V], grows

    @torch.no_grad()
    def __call__(self, model: Any) -> None:
        """Compute the batch; `model` is the program's."""
        program, batch = self._program, self._batch
        hidden = program.embed(batch.token_ids)  # [1, T, H]
        positions = batch.positions  # [T]
        highest = int(positions.numpy().max())
        angles = [table.angles(hidden, positions, highest) for table in self._tables]
        draws = self._sampler.draws()
        groups, places = batch.groups(), self._places(draws or ())
        self.before_run()
        program.run_step(hidden[0], angles, groups, places)
        n_rows = batch.n_scores
        if not n_rows:
            return
        if draws is not None:
            self._sampler.accept_drawn(self._peaks[:n_rows].tolist())
            return
        scores = self._sampler.sample(self._scores[:n_rows]).contiguous()  # [N, V]
        self._highest_scores(
            scores.data_ptr(),
            n_rows,
            program.vocabulary,
            peaks=self._peaks.ctypes.data,
            tokens=self._output_ids.data_ptr(),
        )

    def _places(self, draws: Sequence[Draw]) -> ScorePlaces | None:
        n_rows = self._batch.n_scores
        if not n_rows:
            return None  # all requests are within their prompts
        if n_rows > len(self._scores):
            self._scores = torch.empty(n_rows, self._program.vocabulary)
        return ScorePlaces(
            n_rows,
            self._batch.score_rows,
            self._scores.data_ptr(),
            self._peaks.ctypes.data,
            self._output_ids.data_ptr(),
            draws,
        )
