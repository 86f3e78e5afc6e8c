"""Runs all decoder layers of a batch as one call of the kernel library.

The forward of the model's decoder is replaced: embeddings, rotary angles and the last norm stay
transformers' modules, as do the LM head, scheduling, cache and sampling around it; everything
between is a program (layer_program.py). It calls back for the routed experts of each layer. A model
with a layer that is not recognized, or that computes something else than its description, keeps its
modules.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from faasmoe_kernels import KernelError, KernelLibrary, load
from faasmoe_kernels.router_ops import Layer, LayerProgram, Rope
from faasmoe_transformers.experts_backend import (
    MoELayerComputer,
    NativeFunctions,
    NativeLayerComputer,
    bound_computers,
    native_side_of,
    substituted_computer,
)
from faasmoe_transformers.layer_program import (
    TOLERANCE,
    DifferingLayer,
    LayerDescriber,
    UnrecognizedLayer,
    rope_candidates,
)
from faasmoe_transformers.native_attention import ATTENTION_IMPLEMENTATION, describe_batch
from faasmoe_transformers.observation import (
    FixedExperts,
    ObservedLayer,
    ObservedPass,
    RotaryCall,
    observe_passes,
)

logger = logging.getLogger(__name__)

ComputeMode = Literal["auto", "modules", "torch"]
"""What computes the router's part of a model on a CPU in float32: auto is one call of the kernel
library for all decoder layers where that computes what transformers' modules do; modules always
runs these, with the library's linear layers and attention; torch leaves the library unused."""


def use_native_step(model: Any, batch_processor: Any) -> bool:
    """Replace the decoder's forward if all of its layers can be run by the kernel library.

    Args:
        model: the model, with native attention selected or not.
        batch_processor: the continuous batching's processor, before its first batch.

    Returns:
        Whether it was replaced.
    """
    decoder = _decoder_of(model)
    if model.config._attn_implementation != ATTENTION_IMPLEMENTATION or decoder is None:
        return False
    started_s = time.monotonic()
    try:
        forward = _build(model, decoder, batch_processor)
    except DifferingLayer as reason:
        logger.warning("Decoder layers are run by transformers' modules: %s", reason)
        return False
    except UnrecognizedLayer as reason:
        logger.info("Decoder layers are run by transformers' modules: %s", reason)
        return False
    except Exception:  # the model's own, which the first batch will report to its requests
        logger.warning("Decoder layers cannot be compared with a program", exc_info=True)
        return False
    decoder.forward = forward
    logger.info(
        "%d decoder layers are run as one call of the kernel library (compared with transformers' "
        "modules in %.2f s)",
        len(decoder.layers),
        time.monotonic() - started_s,
    )
    return True


def restore_modules(model: Any) -> None:
    """Undo `use_native_step`, whose program keeps the cache of its batcher alive."""
    decoder = _decoder_of(model)
    if decoder is not None:
        decoder.__dict__.pop("forward", None)


def _decoder_of(model: Any) -> Any:
    """Return the module with the decoder layers, if the model has it where most families do."""
    decoder = getattr(model, model.base_model_prefix, None)
    names = ("layers", "norm", "embed_tokens")
    return decoder if all(hasattr(decoder, name) for name in names) else None


def _build(model: Any, decoder: Any, batch_processor: Any) -> NativeForward:
    experts = FixedExperts()
    cache = batch_processor.cache
    with torch.no_grad(), substituted_computer(model, experts):
        for i, seen in enumerate(observe_passes(model, decoder, batch_processor, experts)):
            if i == 0:
                describer = LayerDescriber(cache)
                program = _Program(decoder, cache, describer, seen, experts)
            program.verify(seen)
    program.bind(bound_computers(model))
    return NativeForward(decoder, program)


class _Program:
    """A program of all layers of a decoder.

    Args:
        decoder: the module with the layers.
        cache: transformers' paged cache.
        describer: describes the layers; keeps what they point to.
        seen: a pass of the modules.
        computer: computes the experts of every layer until others are bound.

    Attributes:
        rotary_calls: the calls that compute angles.
        output_type: class of the decoder's output.

    Raises:
        UnrecognizedLayer: a layer cannot be described.
    """

    def __init__(
        self,
        decoder: Any,
        cache: Any,
        describer: LayerDescriber,
        seen: ObservedPass,
        computer: MoELayerComputer,
    ) -> None:
        self._computers: Mapping[int, MoELayerComputer] = {}
        self._native: NativeLayerComputer | None = None
        self.rotary_calls: list[RotaryCall] = seen.rotary_calls
        self.output_type = seen.output_type
        self._embed_tokens = decoder.embed_tokens
        self._embedding_scale = seen.embedding_scale
        self._cache = cache
        self._describer = describer
        self._experts = NativeExperts(self)
        self._default_computer = computer
        self._library: KernelLibrary = load()
        if len(seen.layers) != len(decoder.layers):
            raise UnrecognizedLayer(f"{len(seen.layers)} of {len(decoder.layers)} layers ran")
        layers = [
            describer.describe(module, layer.routing)
            for module, layer in zip(decoder.layers, seen.layers, strict=True)
        ]
        self._hidden_size = seen.layers[0].before.shape[-1]
        self._set_ropes(layers, seen)
        self._layers = layers
        self._program = self._make(layers)

    def bind(self, computers: Mapping[int, MoELayerComputer]) -> None:
        """Use these computers from now on, by MoE layer; natively if it is one that can."""
        self._computers = computers
        distinct = {id(computer): computer for computer in computers.values()}
        if len(distinct) == 1:
            self._native = native_side_of(next(iter(distinct.values())))
        if self._native is not None and self._native.native is not None:
            self._program = self._make(self._layers, self._native.native.program)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the first layer's input, float32 [1, T, H], of tokens [1, T]."""
        embeddings: Tensor = self._embed_tokens(token_ids)
        if abs(self._embedding_scale - 1.0) > TOLERANCE:
            return embeddings * self._embedding_scale
        return embeddings.contiguous()

    def compute(
        self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weight: Tensor
    ) -> Tensor:
        """Return the weighted sum of each row's experts, [T, H], computed outside the program."""
        computer = self._computers.get(layer, self._default_computer)
        compute = computer.compute if self._native is None else self._native.compute_general
        return compute(
            layer, hidden, top_k_index, top_k_weight, while_waiting=self._program.overlap
        )

    def run_step(
        self,
        hidden: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Run all layers on a batch; arguments as `run` has them."""
        if self._native is None or self._native.native is None:
            self.run(hidden, angles, kwargs)
            return
        self._native.start_pass(len(hidden))
        try:
            self.run(hidden, angles, kwargs)
        finally:
            self._native.native.finish_pass()

    def run(
        self,
        hidden: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        kwargs: Mapping[str, Any],
        *,
        first_layer: int = 0,
        n_layers: int | None = None,
    ) -> None:
        """Run layers on a batch.

        Args:
            hidden: hidden states float32 [T, H], modified in place.
            angles: cosines and sines [T, angles] of each rotary call.
            kwargs: continuous batching's arguments of the model.
            first_layer: the first layer to run.
            n_layers: how many to run; None for all from there.
        """
        allocators = self._cache.cache_allocators.values()
        try:
            self._program.run(
                hidden.data_ptr(),
                len(hidden),
                groups=[describe_batch(allocator, kwargs) for allocator in allocators],
                angles=[(cosine.data_ptr(), sine.data_ptr()) for cosine, sine in angles],
                n_threads=torch.get_num_threads(),
                first_layer=first_layer,
                n_layers=n_layers,
            )
        except KernelError:
            self._experts.raise_error()
            raise

    def verify(self, seen: ObservedPass) -> None:
        """Compare every layer with what its module computed; raises UnrecognizedLayer."""
        seen.restore_cache()
        for i, layer in enumerate(seen.layers):
            error = self._error_of(seen, i, layer)
            if error > TOLERANCE:
                raise DifferingLayer(f"layer {i} differs from its description by {error:.1e}")

    def _error_of(self, seen: ObservedPass, index: int, layer: ObservedLayer) -> float:
        """Return the largest difference as a fraction of the largest value."""
        hidden = layer.before.clone()  # [T, H]
        self.run(hidden, seen.angles, seen.kwargs, first_layer=index, n_layers=1)
        difference = (hidden - layer.after).abs().max() / layer.after.abs().max()
        return float(difference.nan_to_num(nan=torch.inf))

    def _make(self, layers: Sequence[Layer], native: NativeFunctions | None = None) -> LayerProgram:
        addresses = (
            {}
            if native is None
            else {"begin": native.begin, "finish": native.finish, "context": native.context}
        )
        try:
            return LayerProgram(
                self._library, self._hidden_size, layers, self._experts, **addresses
            )
        except KernelError as error:
            raise UnrecognizedLayer(str(error)) from error

    def _set_ropes(self, layers: Sequence[Layer], seen: ObservedPass) -> None:
        """Find out how each kind of angles rotates heads, by trying on a layer that uses them."""
        found: dict[int, tuple[Rope, int]] = {}
        for i, (described, layer) in enumerate(zip(layers, seen.layers, strict=True)):
            if layer.rotary_call is None:
                continue
            if layer.rotary_call not in found:
                found[layer.rotary_call] = self._find_rope(layers, seen, i)
            described.rope_table = layer.rotary_call
            described.rope, described.rope_width = found[layer.rotary_call]

    def _find_rope(
        self, layers: Sequence[Layer], seen: ObservedPass, index: int
    ) -> tuple[Rope, int]:
        layer, call = layers[index], seen.layers[index].rotary_call
        assert call is not None
        layer.rope_table = call
        n_angles = seen.angles[call][0].shape[-1]
        errors = []
        for rope, width in rope_candidates(n_angles, layer.attention.head_dim):
            layer.rope, layer.rope_width = rope, width
            self._program = self._make(layers)
            seen.restore_cache()
            errors.append(self._error_of(seen, index, seen.layers[index]))
            if errors[-1] <= TOLERANCE:
                return rope, width
        raise DifferingLayer(
            f"layer {index} differs from its description by {min(errors, default=torch.inf):.1e}"
        )


class NativeExperts:
    """Computes routed experts when the program calls back.

    An error is kept until the program has returned, and raised then.
    """

    def __init__(self, program: _Program) -> None:
        self._program = program
        self._error: BaseException | None = None

    def __call__(
        self,
        _context: int | None,
        layer: int,
        rows: int,
        hidden_size: int,
        top_k: int,
        hidden: int,
        index: int,
        weight: int,
        out: int,
    ) -> int:
        """Write the weighted sum of each row's experts, [rows, hidden_size]; see ComputeExperts."""
        try:
            total = self._program.compute(
                layer,
                _view(hidden, ctypes.c_float, torch.float32, rows, hidden_size),
                _view(index, ctypes.c_int64, torch.int64, rows, top_k),
                _view(weight, ctypes.c_float, torch.float32, rows, top_k),
            )
            _view(out, ctypes.c_float, torch.float32, rows, hidden_size).copy_(total)
        except BaseException as error:  # it must not cross the native frames
            self._error = error
            return -1
        return 0

    def raise_error(self) -> None:
        """Raise the error of the last call, if it failed."""
        error, self._error = self._error, None
        if error is not None:
            raise error


class NativeForward:
    """The decoder's forward.

    Args:
        decoder: the module whose forward it replaces.
        program: its layers.
    """

    def __init__(self, decoder: Any, program: _Program) -> None:
        self._decoder = decoder
        self._modules_forward: Callable[..., Any] = decoder.forward
        self._program = program

    def __call__(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the decoder's output; without a paged cache by its modules."""
        if kwargs.get("cache") is None or position_ids is None or input_ids is None:
            return self._modules_forward(
                input_ids=input_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        hidden = self._program.embed(input_ids)  # [1, T, H]
        angles = [call.angles(hidden, position_ids) for call in self._program.rotary_calls]
        self._program.run_step(hidden[0], angles, kwargs)
        return self._program.output_type(last_hidden_state=self._decoder.norm(hidden))


def _view(address: int, ctype: Any, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    memory = (ctype * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)
