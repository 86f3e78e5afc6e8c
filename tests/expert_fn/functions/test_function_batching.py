"""Requests that are computed as one give what each gives alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.wire import Dtype, ExpertRequest, OutputMode, decode_request, encode_request
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.function import concat_requests, request_batch_key

HIDDEN = 32
EXPERTS = (1, 3, 4, 6)


def request(seed: int, *, mode: OutputMode, n_rows: int, layer: int = 0) -> ExpertRequest:
    """Rows with one to four pairs each."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, len(EXPERTS) + 1, n_rows)
    rows = draw.standard_normal((n_rows, HIDDEN), dtype=np.float32)
    expert = np.concatenate([draw.permutation(EXPERTS)[:n] for n in counts])
    frame = encode_request(
        rows.tobytes(),
        dtype=Dtype.FLOAT32,
        mode=mode,
        layer=layer,
        hidden_size=HIDDEN,
        n_rows=n_rows,
        pair_row=np.repeat(np.arange(n_rows, dtype=np.int32), counts),
        pair_expert=expert.astype(np.int32),
        pair_weight=draw.random(len(expert), dtype=np.float32),
    )
    return decode_request(bytearray().join(frame))


@pytest.fixture(scope="module")
def function(prepared_store: PreparedStore) -> ExpertFunction:
    store = prepared_store("mixtral")
    return ExpertFunction(make_function_spec(store, [0, 1], EXPERTS), store)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3, 1, 7), (2, 30, 1, 1, 9)])
def test_each_gets_its_own_rows_in_reduced_mode(
    sizes: Sequence[int], function: ExpertFunction
) -> None:
    asked = [request(i, mode=OutputMode.REDUCED, n_rows=n) for i, n in enumerate(sizes)]
    together = function.compute_batch(asked)
    for alone, got in zip(map(function.compute, asked), together, strict=True):
        assert got.shape == alone.shape
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3, 1, 7), (2, 30, 1, 1, 9)])
def test_each_gets_its_own_bits_in_unreduced_mode(
    sizes: Sequence[int], function: ExpertFunction
) -> None:
    asked = [request(i, mode=OutputMode.UNREDUCED, n_rows=n) for i, n in enumerate(sizes)]
    together = function.compute_batch(asked)
    for alone, got in zip(map(function.compute, asked), together, strict=True):
        assert torch.equal(got, alone)


def test_every_request_counts_as_a_frame(function: ExpertFunction) -> None:
    before = function.n_frames
    function.compute_batch([request(i, mode=OutputMode.REDUCED, n_rows=2) for i in range(3)])
    assert function.n_frames == before + 3


def test_one_request_is_joined_without_a_copy() -> None:
    alone = request(0, mode=OutputMode.REDUCED, n_rows=3)
    assert concat_requests([alone]) is alone


def test_only_what_can_be_one_frame_is_alike() -> None:
    first = request(0, mode=OutputMode.REDUCED, n_rows=3)
    assert request_batch_key(first) == request_batch_key(
        request(1, mode=OutputMode.REDUCED, n_rows=9)
    )
    assert request_batch_key(first) != request_batch_key(
        request(0, mode=OutputMode.UNREDUCED, n_rows=3)
    )
    assert request_batch_key(first) != request_batch_key(
        request(0, mode=OutputMode.REDUCED, n_rows=3, layer=1)
    )
