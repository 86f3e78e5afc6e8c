"""Prepares the batches of a generation step without torch: indices written into static memory.

transformers builds Python lists with the slot of every cached token and turns them into tensors,
which costs a step of one token most of a millisecond, and more with every token of its context.
Here they are computed from the block tables, into the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.requests import TMP_TOKEN_ID

from faasmoe_kernels.router_ops import AttentionBatch

Int64s = NDArray[np.int64]

PlanRequests = Callable[[list[Any]], object]
"""Receives the requests whose scores a batch computes, in the order of its scores."""


class BatchInputs:
    """The inputs of one batch at a time; replaces `prepare_batch_tensors` of transformers' inputs.

    Args:
        inputs: transformers' inputs of synchronous batches on the host, without masks or padding.
        cache: transformers' paged cache.
        plan_requests: prepares for the scores of a batch.

    Attributes:
        n_rows: tokens T of the batch.
        n_scores: requests N whose scores it computes.
        score_rows: address of their rows, int32 [N].
    """

    def __init__(self, inputs: Any, cache: Any, plan_requests: PlanRequests) -> None:
        self._inputs = inputs
        self._plan_requests = plan_requests
        self._token_ids, self._positions = inputs.input_ids, inputs.position_ids  # int32
        self._query_ends = inputs.cumulative_seqlens_q.numpy()
        self._score_rows = inputs.logits_indices.numpy()
        self._groups = [
            _GroupInputs(allocator, inputs) for allocator in cache.cache_allocators.values()
        ]
        self.n_rows = self.n_scores = 0
        self.score_rows: int = inputs.logits_indices.data_ptr()
        self._query_ends[0] = 0

    @property
    def token_ids(self) -> Tensor:
        """The batch's tokens, int32 [1, T]."""
        ids: Tensor = self._token_ids[: self.n_rows]
        return ids.unsqueeze(0)

    @property
    def positions(self) -> Tensor:
        """Their positions, int32 [T]."""
        positions: Tensor = self._positions[: self.n_rows]
        return positions

    def groups(self) -> list[AttentionBatch]:
        """Return the batch as each kind of attention sees it."""
        return [group.describe(self._inputs.num_request_in_batch) for group in self._groups]

    def prepare(self, requests_in_batch: Sequence[Any], **_: Any) -> None:
        """Write the inputs of a batch, and advance its requests by its tokens.

        Args:
            requests_in_batch: transformers' FutureRequestStates.
        """
        token_ids, positions = self._token_ids.numpy(), self._positions.numpy()
        n_rows = n_scores = 0
        for group in self._groups:
            group.n_keys = 0
        for i, future in enumerate(requests_in_batch):
            state, n_new = future.state, future.query_length
            past, end = state.position_offset, n_rows + n_new
            token_ids[n_rows:end] = state.tokens_to_process
            positions[n_rows:end] = past if n_new == 1 else np.arange(past, past + n_new)
            for group in self._groups:
                group.add_request(i, state.request_id, past, n_rows, end)
            state.position_offset = past + n_new
            n_rows = self._query_ends[i + 1] = end
            if future.has_new_token:
                self._score_rows[n_scores] = end - 1
                n_scores += 1
                state.tokens_to_process = [TMP_TOKEN_ID]
        self.n_rows, self.n_scores = n_rows, n_scores
        self._inputs.requests_in_batch = list(requests_in_batch)
        self._inputs.num_request_in_batch = len(requests_in_batch)
        self._plan_requests([future for future in requests_in_batch if future.has_new_token])


class _GroupInputs:
    """The part of the inputs that one kind of attention reads.

    Args:
        allocator: the cache's allocator of that kind.
        inputs: transformers' inputs.

    Attributes:
        n_keys: keys of the requests added so far.
    """

    def __init__(self, allocator: Any, inputs: Any) -> None:
        self._allocator = allocator
        self._is_full = allocator.layer_type == FULL_ATTENTION
        key_ends = inputs.cumulative_seqlens_k[allocator.layer_type]  # int32
        read, write = (
            storage[allocator.index]
            for storage in (inputs.read_index_storage, inputs.write_index_storage)
        )  # int64 each
        self._addresses = tuple(
            tensor.data_ptr() for tensor in (inputs.cumulative_seqlens_q, key_ends, read, write)
        )
        self._key_ends, self._read, self._write = (t.numpy() for t in (key_ends, read, write))
        self._page = np.arange(allocator.tokens_per_page, dtype=np.int64)
        self.n_keys = 0

    def describe(self, n_requests: int) -> AttentionBatch:
        """Return the batch as this kind of attention sees it."""
        return AttentionBatch(n_requests, *self._addresses)

    def add_request(self, index: int, request_id: str, past: int, begin: int, end: int) -> None:
        """Write the offsets and slots of a request.

        Args:
            index: its place in the batch.
            request_id: the request.
            past: its tokens in the cache.
            begin: its first row.
            end: the row after its last one.
        """
        allocator, n_new = self._allocator, end - begin
        n_keys = allocator.get_seqlen_k(past, n_new)
        n_cached = n_keys - n_new
        self._key_ends[index] = self.n_keys
        if n_cached:
            cached = self._read[self.n_keys : self.n_keys + n_cached]
            if self._is_full:
                cached[:] = self._slots(request_id, n_cached)
            else:
                cached[:] = allocator.get_read_indices(request_id, past, n_new)[:n_cached]
        self._write[begin:end] = allocator.get_write_indices(request_id, past, n_new)
        self.n_keys += n_keys
        self._key_ends[index + 1] = self.n_keys

    def _slots(self, request_id: str, n_tokens: int) -> Int64s:
        """Return the slots of a request's first tokens."""
        n_pages = -(-n_tokens // len(self._page))
        pages = np.array(self._allocator.block_table[request_id][:n_pages], dtype=np.int64)
        first_slots = pages * self._allocator.block_physical_stride  # [pages]
        slots: Int64s = (first_slots[:, None] + self._page).reshape(-1)
        return slots[:n_tokens]


def is_supported(inputs: Any, model_runner: Any) -> bool:
    """Return whether batches are computed as BatchInputs prepares them."""
    return (
        inputs.device == torch.device("cpu")
        and inputs.attention_mask is None
        and not inputs.return_logprobs
        and not inputs.block_table.numel()
        and not model_runner.pad_inputs
        and not model_runner.do_sample
    )
