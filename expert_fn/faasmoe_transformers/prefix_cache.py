"""Salts the hashes of transformers' prefix cache, so that groups of requests share nothing.

transformers finds a cached block by the hash of its tokens, chained from the first token of the
prompt. The salt replaces that first token, for the hash only, so equal prompts of different groups
have different hashes. Which requests form a group is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

HASHED_TOKEN_BITS = 31
"""Bits of a token that enter the hash: transformers hashes tokens as signed 32-bit integers."""

SaltTokens = Callable[[str, Sequence[int]], list[int] | None]
"""Maps a request id and its tokens to the tokens to hash; None if the request shares nothing."""


def salt_prefix_cache(cache: Any, salt_tokens: SaltTokens) -> None:
    """Make a PagedAttentionCache look up and register blocks by salted hashes."""
    search_unsalted = cache.search_prefix_match

    def search_salted(request_id: str, prompt_ids: Sequence[int]) -> int:
        salted = salt_tokens(request_id, prompt_ids)
        return 0 if salted is None else int(search_unsalted(request_id, salted))

    cache.search_prefix_match = search_salted
    for allocator in cache.cache_allocators.values():
        _salt_block_hashes(allocator, salt_tokens)


def _salt_block_hashes(allocator: Any, salt_tokens: SaltTokens) -> None:
    mark_unsalted = allocator.mark_complete_blocks

    def mark_salted(request_id: str, token_ids: Sequence[int], n_new: int) -> None:
        salted = salt_tokens(request_id, token_ids)
        if salted is not None:
            mark_unsalted(request_id, salted, n_new)

    allocator.mark_complete_blocks = mark_salted
