"""The MoE architectures of GGUF files that are read: names and layouts of their tensors.

llama.cpp's converter renames tensors, splits the experts' gate and up projections, and stores what
transformers keeps [in, out] as [out, in]; all of this is undone here. None of these architectures
has norms stored with an offset or rotary embeddings stored permuted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from faasmoe_contracts.text import short_repr
from faasmoe_router.checkpoint.gguf.tensors import ExpertStack, GgufTensor, ReshapedTensor
from faasmoe_router.errors import SourceDamaged, SourceUnsupported
from faasmoe_transformers.weight_conversion import LazyTensor

_BLOCK_NAME = re.compile(r"blk\.(\d{1,6})\.(.+)")
_MODEL_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES: Mapping[str, str] = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    **{
        f"attn_{part}.{kind}": f"self_attn.{module}.{kind}"
        for part, module in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"))
        for kind in ("weight", "bias")
    },
    "attn_output.weight": "self_attn.o_proj.weight",
}
_SHARED_EXPERT_NAMES: Mapping[str, str] = {
    f"ffn_{part}_shexp.weight": f"mlp.shared_expert.{part}_proj.weight"
    for part in ("gate", "up", "down")
} | {"ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight"}
_EXPERT_NAME = re.compile(r"ffn_(gate|up|down)_exps\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Attributes:
        name: `general.architecture` of a file.
        model_type: transformers' name of the family.
        class_name: transformers' class.
        block_names: names in a layer by llama.cpp's, beyond those that all have.
        is_transposed: whether the class keeps the experts' weights [in, out].
        is_interleaved: whether the class alternates rows of gate and up.
        is_biased: whether projections of the attention always have biases.
    """

    name: str
    model_type: str
    class_name: str
    block_names: Mapping[str, str] = field(default_factory=dict)
    is_transposed: bool = False
    is_interleaved: bool = False
    is_biased: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", _SHARED_EXPERT_NAMES),
        Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM"),
        Architecture(
            "gpt-oss",
            "gpt_oss",
            "GptOssForCausalLM",
            {
                "post_attention_norm.weight": "post_attention_layernorm.weight",
                "attn_output.bias": "self_attn.o_proj.bias",
                "attn_sinks.weight": "self_attn.sinks",
                "ffn_gate_inp.weight": "mlp.router.weight",
                "ffn_gate_inp.bias": "mlp.router.bias",
            },
            is_transposed=True,
            is_interleaved=True,
            is_biased=True,
        ),
        Architecture(
            "minimax-m2",
            "minimax_m2",
            "MiniMaxM2ForCausalLM",
            {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
        ),
    )
}


def find_architecture(name: str, file: str) -> Architecture:
    """Return an architecture by its name in a file; raises SourceUnsupported if it is not read."""
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise SourceUnsupported(
            f"{file}: general.architecture: got {short_repr(name)}, expected one of "
            f"{', '.join(ARCHITECTURES)}: of GGUF files, these MoE architectures are read; others "
            "are served from their safetensors checkpoint"
        )
    return architecture


def name_tensors(
    architecture: Architecture, tensors: Mapping[str, GgufTensor], file: str
) -> dict[str, LazyTensor]:
    """Return a file's tensors by the names of the model's parameters.

    Tensors without a counterpart keep their name.

    Args:
        architecture: the file's architecture.
        tensors: its tensors by name.
        file: its name, for messages.

    Raises:
        SourceDamaged: gate and up projections of a layer are not alike.
    """
    named: dict[str, LazyTensor] = {}
    block_names = {**_BLOCK_NAMES, **architecture.block_names}
    experts: dict[tuple[str, str, str], GgufTensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK_NAME.fullmatch(name)
        if block is None:
            named[_MODEL_NAMES.get(name, name)] = tensor
        elif expert := _EXPERT_NAME.fullmatch(block[2]):
            experts[block[1], expert[1], expert[2]] = tensor
        else:
            target = block_names.get(block[2])
            new_name = name if target is None else f"model.layers.{block[1]}.{target}"
            is_gate = target == "mlp.shared_expert_gate.weight" and len(tensor.get_shape()) == 1
            named[new_name] = ReshapedTensor(tensor) if is_gate else tensor
    return named | _stack_experts(architecture, experts, file)


def _stack_experts(
    architecture: Architecture, experts: Mapping[tuple[str, str, str], GgufTensor], file: str
) -> dict[str, LazyTensor]:
    """Return the experts' parameters of transformers' class.

    Args:
        architecture: the file's architecture.
        experts: tensors by layer, part and kind.
        file: the file's name.
    """
    stacks: dict[str, LazyTensor] = {}
    for (layer, part, kind), tensor in experts.items():
        n_dimensions = 3 if kind == "weight" else 2
        if len(tensor.get_shape()) != n_dimensions:
            expected = f"{n_dimensions} dimensions, the first of them experts"
            raise _wrong_shape(file, tensor, expected)
        if part == "up":
            _partner(experts, (layer, "gate", kind), tensor, file)
            continue
        parts = [tensor]
        if part == "gate":
            parts.append(_partner(experts, (layer, "up", kind), tensor, file))
        suffix = "" if kind == "weight" else "_bias"
        module = "gate_up_proj" if part == "gate" else "down_proj"
        stacks[f"model.layers.{layer}.mlp.experts.{module}{suffix}"] = ExpertStack(
            parts,
            interleaved=architecture.is_interleaved,
            transposed=architecture.is_transposed and kind == "weight",
        )
    return stacks


def _partner(
    experts: Mapping[tuple[str, str, str], GgufTensor],
    key: tuple[str, str, str],
    tensor: GgufTensor,
    file: str,
) -> GgufTensor:
    """Return the gate or up projection that belongs to an up or gate projection."""
    layer, part, kind = key
    partner = experts.get(key)
    if partner is None:
        raise SourceDamaged(
            f"{file}: blk.{layer}.ffn_{part}_exps.{kind}: got no such tensor, expected one beside "
            f"{tensor.info.name}"
        )
    if partner.get_shape() != tensor.get_shape():
        raise _wrong_shape(file, partner, f"{tensor.get_shape()}, as {tensor.info.name}")
    return partner


def _wrong_shape(file: str, tensor: GgufTensor, expected: str) -> SourceDamaged:
    return SourceDamaged(
        f"{file}: {tensor.info.name}: got shape {tensor.get_shape()}, expected {expected}"
    )
