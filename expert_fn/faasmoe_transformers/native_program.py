"""A model's program: described layers, compared with what its modules were seen to compute."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from faasmoe_kernels import KernelError, KernelLibrary, load
from faasmoe_kernels.router_ops import (
    AttentionBatch,
    Head,
    Layer,
    LayerProgram,
    Rope,
    ScorePlaces,
)
from faasmoe_transformers.experts_backend import (
    MoELayerComputer,
    NativeFunctions,
    NativeLayerComputer,
    native_side_of,
)
from faasmoe_transformers.layer_program import (
    TOLERANCE,
    DifferingLayer,
    LayerDescriber,
    UnrecognizedLayer,
    rope_candidates,
)
from faasmoe_transformers.native_attention import describe_batch
from faasmoe_transformers.native_experts import NativeExperts
from faasmoe_transformers.observation import ObservedLayer, ObservedPass, RotaryCall
from faasmoe_transformers.remembered_program import RememberedLayer, RememberedPass

logger = logging.getLogger(__name__)


class ModelProgram:
    """A program of all layers of a decoder, and perhaps of what makes scores of its output.

    Args:
        decoder: the module with the layers.
        cache: transformers' paged cache.
        describer: describes the layers; keeps what they point to.
        seen: a pass of the modules, or what was found about those of an equal model.
        computer: computes the experts of every layer until others are bound.

    Attributes:
        rotary_calls: the calls that compute angles.
        output_type: class of the decoder's output.
        vocabulary: scores V per row; 0 if the program computes none.

    Raises:
        UnrecognizedLayer: a layer cannot be described.
    """

    def __init__(
        self,
        decoder: Any,
        cache: Any,
        describer: LayerDescriber,
        seen: ObservedPass | RememberedPass,
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
        self._experts = NativeExperts(self.compute)
        self._head: Head | None = None
        self.vocabulary = 0
        self._default_computer = computer
        self._library: KernelLibrary = load()
        if len(seen.layers) != len(decoder.layers):
            raise UnrecognizedLayer(f"{len(seen.layers)} of {len(decoder.layers)} layers ran")
        known: Sequence[ObservedLayer | RememberedLayer] = seen.layers
        layers = [
            describer.describe(module, layer.routing)
            for module, layer in zip(decoder.layers, known, strict=True)
        ]
        self._hidden_size = seen.hidden_size
        self._rotary_numbers = [layer.rotary_call for layer in known]
        if isinstance(seen, RememberedPass):
            _restore_ropes(layers, seen)
        else:
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

    def add_head(self, model: Any, norm: Any, seen: ObservedPass | RememberedPass) -> None:
        """Compute scores too, if the last norm and the LM head are recognized.

        Args:
            model: the model.
            norm: the last norm.
            seen: a pass of the modules, or what was found about those of an equal model.
        """
        if isinstance(seen, RememberedPass) and seen.head_scale is None:
            return
        try:
            self._head = self._describer.describe_head(norm, model.get_output_embeddings())
            self.vocabulary = self._head.weight.n
            if isinstance(seen, RememberedPass):
                self._head.scale = seen.head_scale
            else:
                self._program = self._make(self._layers)
                scores = self._scores_of(seen)  # [T, V]
                self._head.scale = float((scores * seen.scores).sum() / (scores * scores).sum())
            self._program = self._make(self._layers)
        except UnrecognizedLayer as reason:
            logger.info("Scores are computed by transformers' modules: %s", reason)
            self._head, self.vocabulary = None, 0

    def found(self) -> RememberedPass:
        """Return what holds for all models of an equal config, once all passes are verified."""
        layers = [
            RememberedLayer(gate, number, int(layer.rope), int(layer.rope_width))
            for gate, number, layer in zip(
                self._describer.gates, self._rotary_numbers, self._layers, strict=True
            )
        ]
        return RememberedPass(
            self._hidden_size,
            self._embedding_scale,
            self.output_type,
            self.rotary_calls,
            layers,
            None if self._head is None else float(self._head.scale),
        )

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
        groups: Sequence[AttentionBatch],
        scores: ScorePlaces | None = None,
    ) -> None:
        """Run all layers on a batch; arguments as `run` has them."""
        if self._native is None or self._native.native is None:
            self.run(hidden, angles, groups, scores=scores)
            return
        self._native.start_pass(len(hidden))
        try:
            self.run(hidden, angles, groups, scores=scores)
        finally:
            self._native.native.finish_pass()

    def run(
        self,
        hidden: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        groups: Sequence[AttentionBatch],
        *,
        first_layer: int = 0,
        n_layers: int | None = None,
        scores: ScorePlaces | None = None,
    ) -> None:
        """Run layers on a batch.

        Args:
            hidden: hidden states float32 [T, H], modified in place.
            angles: cosines and sines [T, angles] of each rotary call.
            groups: the batch as each kind of attention sees it.
            first_layer: the first layer to run.
            n_layers: how many to run; None for all from there.
            scores: which rows' scores to compute afterwards; None for none.
        """
        try:
            self._program.run(
                hidden.data_ptr(),
                len(hidden),
                groups=groups,
                angles=[(cosine.data_ptr(), sine.data_ptr()) for cosine, sine in angles],
                n_threads=torch.get_num_threads(),
                first_layer=first_layer,
                n_layers=n_layers,
                scores=scores,
            )
        except KernelError:
            self._experts.raise_error()
            raise

    def describe_groups(self, kwargs: Mapping[str, Any]) -> list[AttentionBatch]:
        """Return a batch as each kind of attention sees it, from the model's arguments."""
        allocators = self._cache.cache_allocators.values()
        return [describe_batch(allocator, kwargs) for allocator in allocators]

    def verify(self, seen: ObservedPass) -> None:
        """Compare every layer with what its module computed; raises UnrecognizedLayer.

        A head that computes something else is dropped.
        """
        seen.restore_cache()
        for i, layer in enumerate(seen.layers):
            error = self._error_of(seen, i, layer)
            if error > TOLERANCE:
                raise DifferingLayer(f"layer {i} differs from its description by {error:.1e}")
        if self._head is None:
            return
        error = _relative_error(self._scores_of(seen), seen.scores)
        if error > TOLERANCE:
            logger.warning(
                "Scores are computed by transformers' modules: they differ from those of the "
                "program by %.1e",
                error,
            )
            self._head, self.vocabulary = None, 0
            self._program = self._make(self._layers)

    def _scores_of(self, seen: ObservedPass) -> Tensor:
        """Return the scores [T, V] of all rows that the last layer put out."""
        hidden = seen.layers[-1].after.clone()  # [T, H]
        rows = torch.arange(len(hidden), dtype=torch.int32)  # [T]
        scores = torch.empty(len(hidden), self.vocabulary)  # [T, V]
        peaks, tokens = torch.empty(len(hidden)), torch.empty_like(rows)  # [T] each
        places = ScorePlaces(
            n_rows=len(hidden),
            rows=rows.data_ptr(),
            scores=scores.data_ptr(),
            peaks=peaks.data_ptr(),
            tokens=tokens.data_ptr(),
        )
        self.run(hidden, [], [], first_layer=len(self._layers), scores=places)
        return scores

    def _error_of(self, seen: ObservedPass, index: int, layer: ObservedLayer) -> float:
        """Return the largest difference as a fraction of the largest value."""
        hidden = layer.before.clone()  # [T, H]
        groups = self.describe_groups(seen.kwargs)
        self.run(hidden, seen.angles, groups, first_layer=index, n_layers=1)
        return _relative_error(hidden, layer.after)

    def _make(self, layers: Sequence[Layer], native: NativeFunctions | None = None) -> LayerProgram:
        addresses = (
            {}
            if native is None
            else {"begin": native.begin, "finish": native.finish, "context": native.context}
        )
        try:
            return LayerProgram(
                self._library,
                self._hidden_size,
                layers,
                self._experts,
                head=self._head,
                **addresses,
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


def _restore_ropes(layers: Sequence[Layer], found: RememberedPass) -> None:
    for described, layer in zip(layers, found.layers, strict=True):
        if layer.rotary_call is not None:
            described.rope_table = layer.rotary_call
            described.rope, described.rope_width = layer.rope, layer.rope_width


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest value."""
    difference = (actual - expected).abs().max() / expected.abs().max()
    return float(difference.nan_to_num(nan=torch.inf))
