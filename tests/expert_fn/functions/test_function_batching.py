"""Batched requests give the same outputs as individual requests."""

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


def random_request(seed: int, *, mode: OutputMode, n_rows: int, layer: int = 0) -> ExpertRequest:
    """Return a request of random rows with one to four pairs each."""
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
def test_batched_reduced_outputs_match_individual_outputs(
    sizes: Sequence[int], function: ExpertFunction
) -> None:
    requests = [random_request(i, mode=OutputMode.REDUCED, n_rows=n) for i, n in enumerate(sizes)]
    batched = function.compute_batch(requests)
    for alone, got in zip(map(function.compute, requests), batched, strict=True):
        assert got.shape == alone.shape
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3, 1, 7), (2, 30, 1, 1, 9)])
def test_batched_unreduced_outputs_are_bit_identical(
    sizes: Sequence[int], function: ExpertFunction
) -> None:
    requests = [random_request(i, mode=OutputMode.UNREDUCED, n_rows=n) for i, n in enumerate(sizes)]
    batched = function.compute_batch(requests)
    for alone, got in zip(map(function.compute, requests), batched, strict=True):
        assert torch.equal(got, alone)


def test_counts_every_request_of_a_batch(function: ExpertFunction) -> None:
    before = function.n_frames
    function.compute_batch([random_request(i, mode=OutputMode.REDUCED, n_rows=2) for i in range(3)])
    assert function.n_frames == before + 3


def test_single_request_is_not_copied() -> None:
    alone = random_request(0, mode=OutputMode.REDUCED, n_rows=3)
    assert concat_requests([alone]) is alone


def test_batch_key_depends_on_mode_and_layer() -> None:
    first = random_request(0, mode=OutputMode.REDUCED, n_rows=3)
    assert request_batch_key(first) == request_batch_key(
        random_request(1, mode=OutputMode.REDUCED, n_rows=9)
    )
    assert request_batch_key(first) != request_batch_key(
        random_request(0, mode=OutputMode.UNREDUCED, n_rows=3)
    )
    assert request_batch_key(first) != request_batch_key(
        random_request(0, mode=OutputMode.REDUCED, n_rows=3, layer=1)
    )
