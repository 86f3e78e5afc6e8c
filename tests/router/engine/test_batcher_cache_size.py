"""Size of the KV cache under the engine's limits."""

import pytest

from faasmoe_router.engine.batcher import (
    SPARE_PAGES,
    TOKENS_PER_PAGE,
    EngineLimits,
    KVCacheGeometry,
)
from faasmoe_router.errors import RouterConfigError

GEOMETRY = KVCacheGeometry(
    n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, itemsize=2, n_attention_masks=1
)


def test_token_bytes_count_cache_mask_and_read_copy() -> None:
    cache, mask, read = 2 * 2 * 2 * 8 * 2, 64 * 2, (2 * 4 + 2) * 8 * 2 + 8
    assert GEOMETRY.bytes_per_token(64) == cache + mask + read


def test_cache_holds_all_requests_at_full_length_within_the_budget() -> None:
    limits = EngineLimits(max_model_len=100, max_num_seqs=3)
    assert limits.n_pages(GEOMETRY) == 3 * 4 + SPARE_PAGES


def test_cache_stays_within_its_budget() -> None:
    limits = EngineLimits(max_model_len=100, max_num_seqs=512, kv_cache_bytes=10**6)
    n_bytes = limits.n_pages(GEOMETRY) * TOKENS_PER_PAGE * GEOMETRY.bytes_per_token(512)
    assert 0.9e6 < n_bytes <= 1e6


@pytest.mark.parametrize(
    ("max_model_len", "expected_bytes"),
    [(10**5, 2 << 30), (10**7, 10**7 * GEOMETRY.bytes_per_token(512))],
)
def test_default_budget_grows_for_one_long_request_only(
    max_model_len: int, expected_bytes: int
) -> None:
    limits = EngineLimits(max_model_len=max_model_len, max_num_seqs=64)
    n_bytes = limits.n_pages(GEOMETRY) * TOKENS_PER_PAGE * GEOMETRY.bytes_per_token(512)
    assert n_bytes == pytest.approx(expected_bytes, rel=0.01)


def test_rejects_a_budget_below_one_request() -> None:
    limits = EngineLimits(max_model_len=10**6, kv_cache_bytes=10**6)
    with pytest.raises(RouterConfigError, match="kv_cache_bytes: got 1000000, expected at least"):
        limits.n_pages(GEOMETRY)


def test_rejects_a_batch_smaller_than_its_requests() -> None:
    with pytest.raises(RouterConfigError, match="max_num_batched_tokens: got 8, expected at least"):
        EngineLimits(max_model_len=100, max_num_seqs=9, max_num_batched_tokens=8)
