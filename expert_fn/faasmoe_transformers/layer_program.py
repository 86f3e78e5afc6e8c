"""Describes a model's decoder layers to the kernel library, which then runs them as one call.

A layer is recognized by the names that transformers' families share: attention with `q_proj`,
`k_proj`, `v_proj` and `o_proj` after `input_layernorm`, a feed-forward after
`post_attention_layernorm`, which is an MLP or a block of experts with a gate and perhaps a shared
expert. What names do not tell, such as how a gate scores, follows from what the layer was seen to
compute (`ObservedRouting`). native_step.py compares every layer's outputs before the program is
used, so that a wrong guess here costs speed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faasmoe_kernels import Activation, Matrix
from faasmoe_kernels.library import to_struct
from faasmoe_kernels.router_ops import MLP, Attention, Gate, Head, Layer, Norm, Rope, Scoring
from faasmoe_transformers.experts_backend import SHARED_EXPERT_ATTRIBUTES, bound_layer
from faasmoe_transformers.native_attention import describe_attention
from faasmoe_transformers.native_linear import NativeLinear, matrix_of

FEED_FORWARD_ATTRIBUTES = ("mlp", "block_sparse_moe", "feed_forward", "moe")
GATE_ATTRIBUTES = ("gate", "router")
SELECTION_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
GROUP_COUNT_ATTRIBUTES = ("num_group", "n_group")
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
    Activation.RELU2: lambda x: F.relu(x).square(),
    Activation.SIGMOID: torch.sigmoid,
}
# Fractions of the largest value; float32 sums of another order stay far below.
TOLERANCE = 1e-4


class UnrecognizedLayer(Exception):
    """A layer that has no description; the message tells why."""


class DifferingLayer(UnrecognizedLayer):
    """A layer that computes something else than its description."""


@dataclass(frozen=True, slots=True)
class ObservedRouting:
    """The experts that a layer chose for some rows.

    Attributes:
        hidden: the rows, [T, H].
        index: their experts, [T, k].
        weight: the experts' weights, [T, k].
    """

    hidden: Tensor
    index: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class RememberedGate:
    """How a gate chooses experts.

    Attributes:
        top_k: experts of a row.
        scoring: how logits become weights.
        is_normalized: whether weights of a row add up to one.
        scale: factor of the weights.
        n_groups: groups of experts.
        top_groups: groups that a row may choose from.
        scores_per_group: scores that decide which those are.
        bias: number of the selection bias among the block's; None for none.
    """

    top_k: int
    scoring: int
    is_normalized: bool
    scale: float
    n_groups: int
    top_groups: int
    scores_per_group: int
    bias: int | None


class LayerDescriber:
    """Describes layers of one model over one paged cache.

    Args:
        cache: transformers' paged cache.

    Attributes:
        kept: tensors that the descriptions point to.
        gates: how the gates of the described layers choose; None for one without experts.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.kept: list[Tensor] = []
        self.gates: list[RememberedGate | None] = []

    def describe(self, layer: nn.Module, routing: ObservedRouting | RememberedGate | None) -> Layer:
        """Return the layer's description, without its rotary embedding.

        Args:
            layer: the decoder layer.
            routing: what its gate was seen to choose, or what was found of that; None if it has
                no experts.

        Raises:
            UnrecognizedLayer: the layer differs from what a description can express.
        """
        attention = _child(layer, "self_attn", "attention")
        described = Layer(
            input_norm=self._norm(_child(layer, "input_layernorm")),
            feed_forward_norm=self._norm(_child(layer, "post_attention_layernorm")),
            query=_matrix(attention, "q_proj"),
            key=_matrix(attention, "k_proj"),
            value=_matrix(attention, "v_proj"),
            output=_matrix(attention, "o_proj", "out_proj"),
            attention=self._attention(attention),
            attention_group=self._cache.layer_to_allocator[attention.layer_idx].index,
            residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
            moe_layer=-1,
        )
        for name, norm in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            module = getattr(attention, norm, None) or getattr(
                attention, f"{norm[0]}_layernorm", None
            )
            if module is not None:
                setattr(described, name, self._norm(module))
        self.gates.append(None)
        self._describe_feed_forward(described, _child(layer, *FEED_FORWARD_ATTRIBUTES), routing)
        return described

    def describe_head(self, norm: nn.Module, linear: Any) -> Head:
        """Return the last norm and the LM head, with scores that are not scaled.

        Raises:
            UnrecognizedLayer: they differ from what a description can express.
        """
        matrix = getattr(getattr(linear, "forward", None), "matrix", None)
        if not isinstance(matrix, Matrix):
            raise UnrecognizedLayer("the LM head is no native linear layer")
        return Head(self._norm(norm), to_struct(matrix), 1.0)

    def _attention(self, module: Any) -> Attention:
        if getattr(getattr(module, "config", None), "clip_qkv", None) is not None:
            raise UnrecognizedLayer(f"{type(module).__name__} clips queries, keys and values")
        layer = module.layer_idx
        k_cache = self._cache.layer_to_allocator[layer]._kv_token_views[layer][0]
        attention = describe_attention(
            self._cache,
            layer,
            n_heads=module.q_proj.out_features // k_cache.shape[-1],
            scaling=module.scaling,
            softcap=getattr(module, "attn_logit_softcapping", None) or 0.0,
        )
        sinks = getattr(module, "sinks", None)
        if sinks is not None:
            attention.sinks = self._address(sinks)
        return attention

    def _describe_feed_forward(
        self,
        described: Layer,
        block: nn.Module,
        routing: ObservedRouting | RememberedGate | None,
    ) -> None:
        if routing is None:
            described.mlp = _mlp(block)
            return
        layers = [bound_layer(module) for module in block.children()]
        experts = [layer for layer in layers if layer is not None]
        if len(experts) != 1:
            raise UnrecognizedLayer(f"{type(block).__name__} has {len(experts)} experts modules")
        described.moe_layer = experts[0]
        described.gate = self._gate(block, routing)
        for name in SHARED_EXPERT_ATTRIBUTES:
            if isinstance(module := getattr(block, name, None), nn.Module):
                described.mlp = _mlp(module)
        if getattr(block, "shared_expert_gate", None) is not None:
            described.mlp_gate = _matrix(block, "shared_expert_gate")

    def _gate(self, block: nn.Module, routing: ObservedRouting | RememberedGate) -> Gate:
        module: Any = _child(block, *GATE_ATTRIBUTES)
        linear = _linear_of(module)
        if isinstance(linear.forward, NativeLinear):
            weight, bias, matrix = linear.weight, linear.bias, linear.forward.matrix
        else:
            weight, bias = self._keep(linear.weight), getattr(linear, "bias", None)
            bias = None if bias is None else self._keep(bias)
            matrix = matrix_of(weight, bias)
        selection_biases = [self._keep(b.reshape(-1)) for b in _selection_biases(block)]
        if isinstance(routing, RememberedGate):
            found = routing
        else:
            logits = F.linear(routing.hidden, weight.float(), bias)  # [T, E]
            found = _recognize_gate(module, block, logits, routing, selection_biases)
        if found.bias is not None and found.bias >= len(selection_biases):
            raise UnrecognizedLayer(f"{type(module).__name__} has no selection bias {found.bias}")
        self.gates[-1] = found
        chosen = None if found.bias is None else selection_biases[found.bias]
        return Gate(
            weight=to_struct(matrix),
            selection_bias=None if chosen is None else chosen.data_ptr(),
            top_k=found.top_k,
            scoring=found.scoring,
            is_normalized=found.is_normalized,
            scale=found.scale,
            n_groups=found.n_groups,
            top_groups=found.top_groups,
            scores_per_group=found.scores_per_group,
        )

    def _norm(self, module: Any) -> Norm:
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or epsilon is None:
            raise UnrecognizedLayer(f"{type(module).__name__} is no root-mean-square norm")
        ones = torch.ones(1, weight.numel())
        # Some families add one to the weight: what it does to ones tells the factors.
        factors = module(ones)[0] * (1.0 + epsilon) ** 0.5
        return Norm(self._address(factors), weight.numel(), epsilon)

    def _keep(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().float().contiguous()
        self.kept.append(kept)
        return kept

    def _address(self, tensor: Tensor) -> int:
        return self._keep(tensor).data_ptr()


@dataclass(frozen=True, slots=True)
class _GateCandidate:
    """A way in which a gate may choose experts."""

    scoring: Scoring
    is_normalized: bool
    bias: Tensor | None
    n_groups: int = 1
    top_groups: int = 1
    scores_per_group: int = 1

    def scale_of(self, logits: Tensor, routing: ObservedRouting) -> float | None:
        """Return the factor of the weights if this is how the gate chose; else None."""
        scores = logits  # [T, E]
        if self.scoring is Scoring.SOFTMAX:
            scores = logits.softmax(-1)
        elif self.scoring is Scoring.SIGMOID:
            scores = logits.sigmoid()
        selected = scores if self.bias is None else scores + self.bias
        if self.top_groups < self.n_groups:
            selected = self._within_groups(selected)
        index = selected.topk(routing.index.shape[1], -1).indices  # [T, k]
        if not torch.equal(index.sort(-1).values, routing.index.sort(-1).values):
            return None
        weight = scores.gather(-1, routing.index)  # [T, k]
        if self.scoring is Scoring.TOP_K_SOFTMAX:
            weight = weight.softmax(-1)
        elif self.is_normalized:
            weight = weight / weight.sum(-1, keepdim=True)
        observed = routing.weight.float()
        scale = float(observed.sum() / weight.sum())
        is_equal = torch.allclose(
            weight * scale, observed, atol=TOLERANCE * float(observed.max()), rtol=0
        )
        return scale if is_equal else None

    def _within_groups(self, selected: Tensor) -> Tensor:
        """Return the scores [T, E] with those outside of the best groups at minus infinity."""
        groups = selected.view(len(selected), self.n_groups, -1)  # [T, G, E / G]
        best = groups.topk(self.scores_per_group, -1).values.sum(-1)  # [T, G]
        is_out = torch.ones_like(best, dtype=torch.bool)
        is_out.scatter_(-1, best.topk(self.top_groups, -1).indices, False)
        return groups.masked_fill(is_out.unsqueeze(-1), -torch.inf).flatten(1)


def _recognize_gate(
    gate: Any,
    block: nn.Module,
    logits: Tensor,
    routing: ObservedRouting,
    selection_biases: list[Tensor],
) -> RememberedGate:
    """Return how a gate was seen to choose; raises UnrecognizedLayer if that has no description.

    Args:
        gate: the module.
        block: the block of experts that it chooses from.
        logits: what its linear layer computes, [T, E].
        routing: what it was seen to choose.
        selection_biases: what may be added to scores.
    """
    n_groups = _first_attribute((gate, block), *GROUP_COUNT_ATTRIBUTES) or 1
    top_groups = _first_attribute((gate, block), "topk_group") or n_groups
    for candidate in _gate_candidates(selection_biases, n_groups, top_groups):
        scale = candidate.scale_of(logits, routing)
        if scale is None:
            continue
        numbers = [i for i, bias in enumerate(selection_biases) if bias is candidate.bias]
        return RememberedGate(
            top_k=routing.index.shape[1],
            scoring=int(candidate.scoring),
            is_normalized=candidate.is_normalized,
            scale=scale,
            n_groups=candidate.n_groups,
            top_groups=candidate.top_groups,
            scores_per_group=candidate.scores_per_group,
            bias=numbers[0] if numbers else None,
        )
    raise UnrecognizedLayer(f"{type(gate).__name__} chooses experts in a way of its own")


def _gate_candidates(
    selection_biases: list[Tensor], n_groups: int, top_groups: int
) -> Iterator[_GateCandidate]:
    scorings = [
        (Scoring.TOP_K_SOFTMAX, False),
        *product((Scoring.SOFTMAX, Scoring.SIGMOID), (True, False)),
    ]
    for scores_per_group in (2, 1) if top_groups < n_groups else (1,):
        for bias in (*selection_biases, None):
            for scoring, is_normalized in scorings:
                groups = (n_groups, top_groups, scores_per_group)
                yield _GateCandidate(scoring, is_normalized, bias, *groups)


def _linear_of(gate: nn.Module) -> Any:
    """Return the module that computes a gate's logits: itself or its only linear layer."""
    weight = getattr(gate, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and not weight.is_meta:
        return gate
    linears = [module for module in gate.children() if isinstance(module, nn.Linear)]
    if len(linears) != 1:
        raise UnrecognizedLayer(f"{type(gate).__name__} has {len(linears)} linear layers")
    return linears[0]


def _selection_biases(block: nn.Module) -> Iterator[Tensor]:
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if name.rpartition(".")[2] in SELECTION_BIAS_NAMES and not tensor.is_meta:
            yield tensor


def _first_attribute(owners: Sequence[Any], *names: str) -> int | None:
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def rope_candidates(n_angles: int, head_dim: int) -> Iterator[tuple[Rope, int]]:
    """Return how angles may rotate heads, and how many elements of a head each rotates.

    Args:
        n_angles: angles per row.
        head_dim: width of a head.
    """
    wide, narrow = (Rope.HALVES, Rope.PAIRS), (Rope.HALVES_NARROW, Rope.PAIRS_NARROW)
    if n_angles <= head_dim and n_angles % 2 == 0:
        yield from ((rope, n_angles) for rope in wide)
    if 2 * n_angles <= head_dim:
        yield from ((rope, 2 * n_angles) for rope in narrow)


def _child(module: nn.Module, *names: str) -> Any:
    for name in names:
        if isinstance(child := getattr(module, name, None), nn.Module):
            return child
    raise UnrecognizedLayer(f"{type(module).__name__} has no {' or '.join(names)}")


def _matrix(module: nn.Module, *names: str) -> Any:
    child = _child(module, *names)
    if not isinstance(child.forward, NativeLinear):
        raise UnrecognizedLayer(f"{type(module).__name__}.{names[0]} is no native linear layer")
    matrix: Matrix = child.forward.matrix
    return to_struct(matrix)


def _mlp(module: Any) -> MLP:
    forward = getattr(module, "act_fn", None)
    if forward is None:
        raise UnrecognizedLayer(f"{type(module).__name__} has no act_fn")
    x = torch.linspace(-6, 6, 97)
    for activation, function in ACTIVATIONS.items():
        if torch.allclose(forward(x), function(x), atol=1e-6):
            return MLP(
                gate=_matrix(module, "gate_proj"),
                up=_matrix(module, "up_proj"),
                down=_matrix(module, "down_proj"),
                activation=activation,
            )
    raise UnrecognizedLayer(f"{type(module).__name__} has an activation without kernel")
