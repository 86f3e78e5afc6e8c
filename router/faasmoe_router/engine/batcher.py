"""Sizes the KV cache and starts a continuous batcher for the engine.

The adapter runs batches and knows nothing of tenants, settings or the router's errors. This module
supplies them: the memory of the KV cache, request ids that carry the tenant, tokens counted per
tenant, salts that keep the prefix caches of tenant groups apart, which errors end a batcher, and
the sampler. Errors of the adapter become the settings' errors here.

Size and memory cost of the KV cache:

    token_bytes = layers * 2 * kv_heads * head_dim * itemsize            the cache itself
                + masks * batch_tokens * itemsize                        its column of the masks
                + (2 * heads + kv_heads) * head_dim * itemsize + 8       its copy while it is read
    n_tokens    = min(max_num_seqs * max_model_len, budget_bytes // token_bytes)

The masks are [batch_tokens, n_tokens + batch_tokens], one per kind of attention, and none with
flash attention. One request of full length always fits. When several outgrow the cache, the
youngest is put back into the queue and prefilled again later.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from faasmoe_expert import malloc
from faasmoe_expert.device import device_lost_reason
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_router.engine.batch_sampler import BatchSampler, RequestErrorHandler
from faasmoe_router.engine.prompt_shares import PendingPrompt, divide_prompt_tokens
from faasmoe_router.engine.sampler import NativeDrawer
from faasmoe_router.errors import (
    EngineDeviceLost,
    GenerationFailed,
    ModelPartUnavailable,
    RouterConfigError,
    RouterWeightsChanged,
    StoreCorrupted,
    StoreUnreadable,
)
from faasmoe_router.referenced_tensors import check_weights
from faasmoe_transformers.attention import count_attention_masks, select_attention_implementation
from faasmoe_transformers.continuous_batching import (
    BatchingLimits,
    ContinuousBatcher,
    OutputHandler,
)
from faasmoe_transformers.error_isolation import ErrorPolicy
from faasmoe_transformers.errors import CacheAllocationFailed, CacheTooSmall, UnsupportedModel
from faasmoe_transformers.native_step import ComputeMode
from faasmoe_transformers.prefix_cache import HASHED_TOKEN_BITS
from faasmoe_transformers.scheduler import ComputedTokens

TOKENS_PER_PAGE = 32
DEFAULT_KV_CACHE_BYTES = 2 << 30
# A hybrid model's cache is allocated in sectors of several pages; these cover the rounding loss.
SPARE_PAGES = 8


@dataclass(frozen=True, slots=True)
class KVCacheGeometry:
    """The sizes of a model that determine what a token of its cache costs.

    Attributes:
        n_layers: number of layers.
        n_heads: query heads per layer.
        n_kv_heads: key and value heads per layer.
        head_dim: width of a head.
        itemsize: bytes of an element.
        n_attention_masks: masks per batch.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    itemsize: int
    n_attention_masks: int

    @classmethod
    def from_model(cls, model: Any) -> KVCacheGeometry:
        """Return the geometry of a transformers model with its attention selected."""
        config = model.config.get_text_config()
        n_heads = config.num_attention_heads
        return cls(
            n_layers=config.num_hidden_layers,
            n_heads=n_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
            itemsize=model.dtype.itemsize,
            n_attention_masks=count_attention_masks(config),
        )

    def bytes_per_token(self, batch_tokens: int) -> int:
        """Return the bytes of one token of the cache, including all that grows with the cache.

        Args:
            batch_tokens: tokens computed in one batch.
        """
        cache_bytes = self.n_layers * 2 * self.n_kv_heads * self.head_dim * self.itemsize
        mask_bytes = self.n_attention_masks * batch_tokens * self.itemsize
        copy_bytes = (2 * self.n_heads + self.n_kv_heads) * self.head_dim * self.itemsize + 8
        return cache_bytes + mask_bytes + copy_bytes


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The engine's limits.

    Attributes:
        max_model_len: tokens of one request, prompt and output together.
        max_num_seqs: requests computed in one batch.
        max_num_batched_tokens: tokens computed in one batch; longer prompts take several batches.
        max_waiting: requests that may wait beyond those computed; more are rejected.
        kv_cache_bytes: budget of the KV cache and all that grows with it; None for 2 GiB, or for
            what one request of full length needs if that is more.
    """

    max_model_len: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    kv_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raise RouterConfigError if a full batch could not decode one token per request."""
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise RouterConfigError(
                f"max_num_batched_tokens: got {self.max_num_batched_tokens}, expected at least "
                f"max_num_seqs, {self.max_num_seqs}: each running request decodes one token a batch"
            )

    @property
    def max_requests(self) -> int:
        """Requests that may be held at once, running and waiting."""
        return self.max_num_seqs + self.max_waiting

    def n_pages(self, geometry: KVCacheGeometry) -> int:
        """Return the pages of the cache; raises RouterConfigError if one request cannot fit."""
        bytes_per_token = geometry.bytes_per_token(self.max_num_batched_tokens)
        required_pages = -(-self.max_model_len // TOKENS_PER_PAGE) + SPARE_PAGES
        required_bytes = required_pages * bytes_per_token * TOKENS_PER_PAGE
        budget_bytes = self.kv_cache_bytes or max(DEFAULT_KV_CACHE_BYTES, required_bytes)
        if budget_bytes < required_bytes:
            raise RouterConfigError(
                f"kv_cache_bytes: got {budget_bytes}, expected at least {required_bytes} "
                f"for one request of max_model_len {self.max_model_len} tokens"
            )
        affordable_pages = budget_bytes // (bytes_per_token * TOKENS_PER_PAGE)
        max_pages = self.max_num_seqs * -(-self.max_model_len // TOKENS_PER_PAGE) + SPARE_PAGES
        return min(max_pages, affordable_pages)


FATAL_ERRORS = (EngineDeviceLost, RouterWeightsChanged)
"""Errors that another batcher in this process would meet again."""


CACHE_SALT_BYTES = 16
SALTED_TOKENS = 16  # at the start of a prompt, whose unused bits hold a request's own salt


def make_request_id(tenant: str, number: int, cache_salt: str | None = None) -> str:
    """Return the id of a tenant's request, with the digest of its own cache salt if it has one."""
    if cache_salt is None:
        return f"{tenant}/{number}"
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=CACHE_SALT_BYTES)
    return f"{tenant}/{number}.{digest.hexdigest()}"


def request_tenant(request_id: str) -> str:
    """Return the tenant of a request."""
    return request_id.rpartition("/")[0]


class ComputedTokenCounter:
    """Counts computed tokens per tenant; one thread writes, any thread drains.

    Args:
        on_batch: called with the number of tokens that each batch computes, and of the prompts
            that end in it.
    """

    def __init__(
        self, on_batch: Callable[[int, int], None] = lambda n_tokens, n_prompts: None
    ) -> None:
        self._on_batch = on_batch
        self._lock = threading.Lock()
        self._tokens: Counter[str] = Counter()

    def add_batch(self, batch: Sequence[ComputedTokens]) -> None:
        """Add what a batch computes of its requests."""
        self._on_batch(sum(c.n_tokens for c in batch), sum(c.ends_prompt for c in batch))
        with self._lock:
            for computed in batch:
                self._tokens[request_tenant(computed.request_id)] += computed.n_tokens

    def drain(self) -> Mapping[str, int]:
        """Return the tokens per tenant since the last call."""
        with self._lock:
            drained, self._tokens = self._tokens, Counter()
        return drained


def _request_salt(request_id: str) -> int:
    """Return a request's own cache salt, which is in its id; 0 if it has none."""
    return int(request_id.rpartition("/")[2].partition(".")[2] or "0", 16)


class CacheSalts:
    """Numbers the tenant groups that share a prefix cache; one thread writes, another reads.

    The salt of a group is put into the bits of the first token that the vocabulary does not use.
    Groups beyond the numbers that fit share nothing. Within a group, requests that bring a salt
    share with those of the same salt only: it is put into the same bits of the next tokens.

    Args:
        vocab_size: size of the model's vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        self._salt_shift = vocab_size.bit_length()
        self._max_salts = 1 << max(0, HASHED_TOKEN_BITS - self._salt_shift)
        self._salt_by_group: dict[str, int] = {}
        self._group_by_tenant: Mapping[str, str] = {}

    def set_groups(self, groups: Mapping[str, str]) -> None:
        """Set each tenant's group; a tenant without one shares nothing."""
        for group in groups.values():
            self._salt_by_group.setdefault(group, len(self._salt_by_group) + 1)
        self._group_by_tenant = dict(groups)

    def salt_tokens(self, request_id: str, tokens: Sequence[int]) -> list[int] | None:
        """Return the tokens to hash instead of `tokens`; None if the request shares nothing."""
        salt = self._salt_by_group.get(self._group_by_tenant.get(request_tenant(request_id), ""), 0)
        if not tokens or not 0 < salt < self._max_salts:
            return None
        salted = [tokens[0] | salt << self._salt_shift, *tokens[1:]]
        self._add_request_salt(salted, _request_salt(request_id))
        return salted

    def _add_request_salt(self, tokens: list[int], salt: int) -> None:
        """Put a request's own salt into the bits of the tokens after the first, in place."""
        for index in range(1, min(SALTED_TOKENS, len(tokens))):
            salt, part = divmod(salt, self._max_salts)
            tokens[index] |= part << self._salt_shift


def divide_between_tenants(
    prompts: Sequence[tuple[str, int]],
    running: Sequence[str],
    max_tokens: int,
    *,
    weight: Callable[[str], float],
) -> Mapping[str, int]:
    """Return how many tokens of each prompt a batch computes; see `divide_prompt_tokens`.

    Args:
        prompts: request ids and the tokens that are left, in the order of their arrival.
        running: requests that generate a token.
        max_tokens: tokens of a batch.
        weight: returns the weight of a tenant; called on the batcher's thread.
    """
    pending = [PendingPrompt(i, request_tenant(i), n_tokens) for i, n_tokens in prompts]
    tenants = [request_tenant(request_id) for request_id in running]
    return divide_prompt_tokens(pending, tenants, max_tokens=max_tokens, weight=weight)


def start_batcher(
    model: Any,
    limits: EngineLimits,
    loop: asyncio.AbstractEventLoop,
    *,
    on_outputs: OutputHandler,
    on_request_error: RequestErrorHandler,
    cache_salts: CacheSalts | None = None,
    computed_tokens: ComputedTokenCounter | None = None,
    weight: Callable[[str], float] = lambda tenant: 1.0,
    on_idle: Callable[[], None] = lambda: None,
    compute: ComputeMode = "auto",
) -> ContinuousBatcher:
    """Allocate the KV cache and start a batcher.

    Args:
        model: the router's model; its attention implementation is selected here.
        limits: the engine's limits.
        loop: event loop on which both handlers are called.
        on_outputs: receives each batch's outputs.
        on_request_error: receives requests that cannot continue, ahead of their outputs.
        cache_salts: which tenants share the prefix cache; None disables it.
        computed_tokens: counts the tokens of each batch.
        weight: returns the weight of a tenant; called on the batcher's thread.
        on_idle: releases what others keep for requests once none has been present for a while.
        compute: what computes the model.

    Raises:
        RouterConfigError: the cache cannot hold one request or does not fit on the device, or
            continuous batching cannot run the model.
    """

    def report_error(request_ids: Sequence[str], error: GenerationFailed) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(on_request_error, request_ids, error)

    def report_external_error(request_id: str, error: Exception) -> None:
        report_error(
            [request_id],
            ModelPartUnavailable(
                "a part of the model that this request needs is not available at the moment"
            ),
        )

    def release_memory() -> None:
        on_idle()
        malloc.trim_heap()

    select_attention_implementation(model)
    batcher = ContinuousBatcher(
        model,
        _batching_limits(limits, KVCacheGeometry.from_model(model)),
        sampler=BatchSampler(
            report_error,
            check_weights=lambda: check_weights(model),
            draw_natively=None if compute == "torch" else _native_drawer(),
        ),
        salt_tokens=None if cache_salts is None else cache_salts.salt_tokens,
        count_batch=None if computed_tokens is None else computed_tokens.add_batch,
        divide_prompts=functools.partial(divide_between_tenants, weight=weight),
        error_policy=ErrorPolicy(
            FATAL_ERRORS,
            (StoreCorrupted, StoreUnreadable),
            _raise_if_device_lost,
            report_external_error,
        ),
        on_idle=release_memory,
        compute=compute,
    )
    try:
        batcher.start(loop, on_outputs)
    except CacheAllocationFailed as error:
        raise RouterConfigError(
            f"kv_cache_bytes: got {limits.kv_cache_bytes or 'none'}, expected what is free beside "
            f"the model: {error}"
        ) from error
    except CacheTooSmall as error:
        raise RouterConfigError(
            f"kv_cache_bytes: got enough for {error.n_sectors} sectors of the cache, "
            f"expected {error.n_required_sectors} for one request of max_model_len tokens"
        ) from error
    except UnsupportedModel as error:
        raise RouterConfigError(f"model: continuous batching cannot run it: {error}") from error
    return batcher


def _native_drawer() -> NativeDrawer | None:
    """Return what draws tokens by the kernel library; None without one."""
    try:
        return NativeDrawer(load())
    except KernelsUnavailable:
        return None


def _batching_limits(limits: EngineLimits, geometry: KVCacheGeometry) -> BatchingLimits:
    return BatchingLimits(
        n_pages=limits.n_pages(geometry),
        page_tokens=TOKENS_PER_PAGE,
        max_batch_tokens=limits.max_num_batched_tokens,
        max_requests=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
    )


def _raise_if_device_lost(device: torch.device, error: Exception) -> None:
    """Raise EngineDeviceLost if an error has left the device unusable for this process."""
    if (reason := device_lost_reason(device)) is not None:
        raise EngineDeviceLost(f"the device {device} is lost: {reason}") from error
