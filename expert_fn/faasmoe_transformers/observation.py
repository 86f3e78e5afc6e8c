"""Watches transformers' modules compute a few rows, so that a native program can be compared.

Two passes over the paged cache run through transformers' own batching: two prompts, or one if a
batch is one sequence, then further tokens, which read what the first pass wrote. Experts are
replaced by a fixed function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    RequestStatus,
    create_warmup_future_states,
)

from faasmoe_transformers.layer_program import ObservedRouting, UnrecognizedLayer

PROMPT_TOKENS = 6
FURTHER_TOKENS = (1, 3)


class FixedExperts:
    """Stands for experts: a function of rows, indices and weights, and a record of them."""

    def __init__(self) -> None:
        self.last: ObservedRouting | None = None

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return a sum [T, H] that depends on all arguments."""
        while_waiting()
        self.last = ObservedRouting(hidden.clone(), top_k_index.clone(), top_k_weight.clone())
        factors = 0.5 + (top_k_index * 7 % 5).float() * 0.1  # [T, k]
        total = (factors * top_k_weight.float()).sum(-1, keepdim=True)  # [T, 1]
        return hidden * total.to(hidden.dtype)


@dataclass(frozen=True, slots=True)
class RotaryCall:
    """A call that computes cosines and sines, to be made again for other positions.

    Attributes:
        module: the rotary embedding.
        args: arguments beyond hidden states and positions.
        kwargs: the same.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def angles(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, float32 [T, angles] each.

        Args:
            hidden: hidden states [1, T, H], for dtype and device.
            position_ids: [1, T].
        """
        cosines, sines = self.module(hidden, position_ids, *self.args, **self.kwargs)
        return _angles(cosines), _angles(sines)


@dataclass(slots=True)
class ObservedLayer:
    """A decoder layer in one pass.

    Attributes:
        before: hidden states before it, [T, H].
        after: hidden states after it, [T, H].
        routing: what its gate chose; None without experts.
        rotary_call: which of the pass's rotary calls computed its angles; None for none.
    """

    before: Tensor
    after: Tensor
    routing: ObservedRouting | None
    rotary_call: int | None


@dataclass(slots=True)
class ObservedPass:
    """One pass of the modules.

    Attributes:
        kwargs: continuous batching's arguments of the model.
        layers: the decoder layers in order.
        rotary_calls: the calls that computed angles.
        angles: cosines and sines [T, angles] of each call.
        embedding_scale: factor between the embeddings and the first layer's input.
        output_type: class of the decoder's output.
        scores: the model's scores of all rows, float32 [T, V].
    """

    kwargs: Mapping[str, Any]
    saved_slots: list[tuple[Tensor, Tensor, Tensor]]
    layers: list[ObservedLayer] = field(default_factory=list)
    rotary_calls: list[RotaryCall] = field(default_factory=list)
    angles: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    embedding_scale: float = 1.0
    output_type: Any = None
    scores: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def hidden_size(self) -> int:
        """Width of hidden states."""
        return int(self.layers[0].before.shape[-1])

    def restore_cache(self) -> None:
        """Put back what the pass has overwritten in the cache, to run it again."""
        for view, slots, content in self.saved_slots:
            view.index_copy_(0, slots, content)


def observe_passes(
    model: Any, decoder: Any, batch_processor: Any, experts: FixedExperts
) -> Iterator[ObservedPass]:
    """Run two passes, and yield after each.

    Args:
        model: the model, with its experts bound to `experts`.
        decoder: its module with the layers.
        batch_processor: continuous batching's processor, before its first batch.
        experts: the stand-in for experts.

    Raises:
        UnrecognizedLayer: the decoder computes something else than embeddings, layers and a norm.
    """
    cache, inputs = batch_processor.cache, batch_processor.inputs_and_outputs
    further_tokens = FURTHER_TOKENS[-len(inputs.logits_indices) :]  # a batch may be one sequence
    futures = create_warmup_future_states(
        len(further_tokens), RequestStatus.PREFILLING, PROMPT_TOKENS, 0, cache
    )
    if len(futures) < len(further_tokens):
        raise UnrecognizedLayer("the cache is too small to compare layers")
    n_tokens = decoder.embed_tokens.num_embeddings
    try:
        for i, future in enumerate(futures):
            future.state.tokens_to_process = [
                (31 * i + 7 * j + 5) % n_tokens for j in range(PROMPT_TOKENS)
            ]
        yield _observe_pass(model, decoder, batch_processor, futures, 0, experts)
        further = [
            _extend(future.state, count, cache, n_tokens)
            for future, count in zip(futures, further_tokens, strict=True)
        ]
        n_read = PROMPT_TOKENS * len(futures)
        yield _observe_pass(model, decoder, batch_processor, further, n_read, experts)
    finally:
        for future in futures:
            cache.free_blocks(future.state.request_id)
        cache.reset()
        inputs.reset()


def _extend(state: Any, count: int, cache: Any, n_tokens: int) -> Any:
    state.tokens_to_process = [(11 * j + 17) % n_tokens for j in range(count)]
    if not cache.can_store_request_tokens(state, count):
        raise UnrecognizedLayer("the cache is too small to compare layers")
    return FutureRequestState(state, has_new_token=True, complete_blocks=0, query_length=count)


def _observe_pass(
    model: Any, decoder: Any, processor: Any, futures: Any, n_read: int, experts: FixedExperts
) -> ObservedPass:
    inputs = processor.inputs_and_outputs
    inputs.prepare_batch_tensors(
        requests_in_batch=futures,
        logits_processors=processor.logit_processor,
        use_decode_fast_path=False,
        num_q_tokens=sum(future.query_length for future in futures),
        max_kv_read=n_read,
        use_padding=False,
    )
    kwargs = inputs.get_model_kwargs()
    seen = ObservedPass(kwargs, list(_save_slots(processor.cache, kwargs)))
    embedded: list[Tensor] = []
    normed: list[Tensor] = []
    with ExitStack() as stack:
        _watch_layers(stack, decoder, seen, experts)
        _watch(stack, decoder.embed_tokens, lambda _, __, output: embedded.append(output))
        _watch(stack, decoder.norm, lambda _, __, output: normed.append(output))
        _watch(stack, decoder, lambda _, __, output: _record_output(seen, output, normed))
        scores = model(**kwargs).logits  # [1, T, V]
    seen.scores = scores.reshape(-1, scores.shape[-1]).float()
    if len(embedded) != 1 or not seen.layers:
        raise UnrecognizedLayer("the decoder has other inputs than its embeddings")
    embeddings, first = (
        embedded[0].reshape(seen.layers[0].before.shape).double(),
        seen.layers[0].before,
    )
    seen.embedding_scale = float((embeddings * first).sum() / (embeddings * embeddings).sum())
    if not torch.allclose(embeddings * seen.embedding_scale, first.double(), rtol=1e-5, atol=1e-6):
        raise UnrecognizedLayer("the first layer's input is not the embeddings")
    for layer, following in zip(seen.layers, seen.layers[1:], strict=False):
        if not torch.equal(layer.after, following.before):
            raise UnrecognizedLayer("the decoder changes hidden states between layers")
    return seen


def _save_slots(cache: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for allocator in cache.cache_allocators.values():
        slots = kwargs["write_index"][allocator.index].clone()
        for views in allocator._kv_token_views.values():
            for view in views:
                yield view, slots, view[slots].clone()


def _watch_layers(
    stack: ExitStack, decoder: Any, seen: ObservedPass, experts: FixedExperts
) -> None:
    rotary_outputs: list[Any] = []
    before: list[Tensor] = []

    def record_rotary(
        module: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        further = {key: value for key, value in named.items() if key not in ("x", "position_ids")}
        n_tensors = len(args) + len(named) - len(further)
        if n_tensors < 2 or not isinstance(output, tuple) or len(output) != 2:
            raise UnrecognizedLayer(f"{type(module).__name__} is called in a way of its own")
        rotary_outputs.append(output)
        seen.rotary_calls.append(RotaryCall(module, args[2:], further))
        seen.angles.append((_angles(output[0]), _angles(output[1])))

    def record_input(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        before.append(hidden.reshape(-1, hidden.shape[-1]).clone())
        experts.last = None

    def record_layer(_: Any, args: Any, named: dict[str, Any], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        angles = named.get("position_embeddings")
        call = next((i for i, o in enumerate(rotary_outputs) if o is angles), None)
        if angles is not None and call is None:
            raise UnrecognizedLayer("angles do not come from a rotary embedding")
        after = hidden.reshape(before[-1].shape).clone()
        seen.layers.append(ObservedLayer(before[-1], after, experts.last, call))

    for module in decoder.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            _watch(stack, module, record_rotary, with_kwargs=True)
    for layer in decoder.layers:
        handle = layer.register_forward_pre_hook(record_input, with_kwargs=True)
        stack.callback(handle.remove)
        _watch(stack, layer, record_layer, with_kwargs=True)


def _record_output(seen: ObservedPass, output: Any, normed: list[Tensor]) -> None:
    seen.output_type = type(output)
    if not normed or not torch.equal(output.last_hidden_state, normed[-1]):
        raise UnrecognizedLayer("the decoder's output is not its norm's")


def _watch(
    stack: ExitStack, module: nn.Module, hook: Callable[..., None], *, with_kwargs: bool = False
) -> None:
    handle = module.register_forward_hook(hook, with_kwargs=with_kwargs)
    stack.callback(handle.remove)


def _angles(values: Tensor) -> Tensor:
    if values.dim() != 3 or values.shape[0] != 1 or not values.is_floating_point():
        raise UnrecognizedLayer(f"angles have the shape {tuple(values.shape)}")
    return values[0].float().contiguous()
