"""The cache of prompts' beginnings, kept apart: a block is found only by those it was made for.

transformers finds a block by the hash of its tokens, chained from the prompt's first. Here the
first token of every prompt is replaced, for the hash only, by one that no vocabulary has and that
no other group of tenants gets, so the same text has other hashes in each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faasmoe_router.engine.scheduler import tenant_of

TOKEN_BITS = 31  # transformers hashes tokens as signed 32-bit numbers


class PrefixRealms:
    """Numbers the groups of tenants that may share; written by one thread, read by another."""

    def __init__(self, vocab_size: int) -> None:
        self._shift = vocab_size.bit_length()
        self._n_realms = 1 << max(0, TOKEN_BITS - self._shift)
        self._numbers: dict[str, int] = {}
        self._groups: Mapping[str, str] = {}

    def set_groups(self, groups: Mapping[str, str]) -> None:
        """Take each tenant's group; who is in none shares nothing."""
        for group in groups.values():
            self._numbers.setdefault(group, len(self._numbers) + 1)
        self._groups = dict(groups)

    def salted(self, request_id: str, tokens: Sequence[int]) -> list[int] | None:
        """Return what to hash in place of these tokens; None if the request shares nothing."""
        number = self._numbers.get(self._groups.get(tenant_of(request_id), ""), 0)
        if not tokens or not 0 < number < self._n_realms:
            return None
        return [tokens[0] | number << self._shift, *tokens[1:]]


def keep_apart(cache: Any, realms: PrefixRealms) -> None:
    """Let transformers' cache look up and keep blocks by their realm's hashes."""
    search = cache.search_prefix_match

    def search_within(request_id: str, prompt_ids: Sequence[int]) -> int:
        salted = realms.salted(request_id, prompt_ids)
        return 0 if salted is None else int(search(request_id, salted))

    cache.search_prefix_match = search_within
    for allocator in cache.cache_allocators.values():
        _mark_within(allocator, realms)


def _mark_within(allocator: Any, realms: PrefixRealms) -> None:
    mark = allocator.mark_complete_blocks

    def mark_within(request_id: str, token_ids: Sequence[int], n_new: int) -> None:
        salted = realms.salted(request_id, token_ids)
        if salted is not None:
            mark(request_id, salted, n_new)

    allocator.mark_complete_blocks = mark_within
