"""The cache of prompts' beginnings, kept apart: a block is found only by those it was made for.

transformers finds a block by the hash of its tokens, chained from the prompt's first. Here the
first token of every prompt is replaced, for the hash only, by one that no vocabulary has and that
no other group of tenants gets, so the same text has other hashes in each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faasmoe_router.transformers_backend.scheduler import request_tenant

HASHED_TOKEN_BITS = 31  # transformers hashes tokens as signed 32-bit numbers


class CacheSalts:
    """Numbers the groups of tenants that may share; written by one thread, read by another."""

    def __init__(self, vocab_size: int) -> None:
        self._salt_shift = vocab_size.bit_length()
        self._max_salts = 1 << max(0, HASHED_TOKEN_BITS - self._salt_shift)
        self._salt_by_group: dict[str, int] = {}
        self._group_by_tenant: Mapping[str, str] = {}

    def set_groups(self, groups: Mapping[str, str]) -> None:
        """Take each tenant's group; who is in none shares nothing."""
        for group in groups.values():
            self._salt_by_group.setdefault(group, len(self._salt_by_group) + 1)
        self._group_by_tenant = dict(groups)

    def salt_tokens(self, request_id: str, tokens: Sequence[int]) -> list[int] | None:
        """Return what to hash in place of these tokens; None if the request shares nothing."""
        salt = self._salt_by_group.get(self._group_by_tenant.get(request_tenant(request_id), ""), 0)
        if not tokens or not 0 < salt < self._max_salts:
            return None
        return [tokens[0] | salt << self._salt_shift, *tokens[1:]]


def salt_prefix_cache(cache: Any, cache_salts: CacheSalts) -> None:
    """Let transformers' cache look up and keep blocks by their realm's hashes."""
    search_unsalted = cache.search_prefix_match

    def search_salted(request_id: str, prompt_ids: Sequence[int]) -> int:
        salted = cache_salts.salt_tokens(request_id, prompt_ids)
        return 0 if salted is None else int(search_unsalted(request_id, salted))

    cache.search_prefix_match = search_salted
    for allocator in cache.cache_allocators.values():
        _salt_block_hashes(allocator, cache_salts)


def _salt_block_hashes(allocator: Any, cache_salts: CacheSalts) -> None:
    mark_unsalted = allocator.mark_complete_blocks

    def mark_salted(request_id: str, token_ids: Sequence[int], n_new: int) -> None:
        salted = cache_salts.salt_tokens(request_id, token_ids)
        if salted is not None:
            mark_unsalted(request_id, salted, n_new)

    allocator.mark_complete_blocks = mark_salted
