"""Conversion of a dense model into a mixture of experts without training (MoEfication).

Each dense feed-forward block is split by the activations that its neurons show on calibration
prompts. The most active neurons become the shared expert; the others are clustered by co-activation
into routed experts of equal size; the gate is fitted by ridge regression to predict which experts
matter for a token. Last, the down projections are fitted by ridge regression to make up for the
experts that are not active.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

ANSWER_TOKENS = 160
CALIBRATION_PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short story about a cat.",
    "How do I boil an egg?",
    "What is machine learning?",
    "Tell me about the moon.",
    "Give me three tips for sleeping well.",
    "Explain photosynthesis.",
    "Who was Isaac Newton?",
    "Write a poem about the sea.",
    "What is Kubernetes?",
    "Summarise the history of Rome.",
)
N_CALIBRATION_STEPS = ANSWER_TOKENS + len(CALIBRATION_PROMPTS)

SHARED_FRACTION, NUM_EXPERTS, TOP_K = 0.5, 8, 4
# Keeps the order of the logits but leaves the top-k weights close to 1/k. With 0.02, 0.05, 0.2 and
# 0.5 the KL from the dense model is 0.87, 0.88, 0.99 and 1.60, the most likely token the same for
# 59, 61, 59 and 52 % of the answers to six prompts that are none of the calibration's.
_GATE_SCALE = 0.05
_DOWN_RIDGE = 0.3  # of the mean squared norm of a neuron; less follows the few prompts too closely
_N_CLUSTER_ITERATIONS = 8
# The sigmoid of such logits is 0.5 in float32. Zeros would do, but llama.cpp computes the sigmoid
# of this gate as silu(x) / x, which is NaN at 0.
_SHARED_GATE_WEIGHT = 2.0**-40
_QKV_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def calibration_inputs(
    dense: Any, tokenizer: Any, *, on_step: Callable[[], None]
) -> list[torch.Tensor]:
    """Return the inputs of each layer's feed-forward block, [N, H], on the calibration prompts.

    The model first answers the prompts, sampling with torch's global generator.

    Args:
        dense: the dense model.
        tokenizer: its tokenizer, with a chat template and left padding.
        on_step: called after each step, at most `N_CALIBRATION_STEPS` times.
    """
    answers = _generate_answers(dense, tokenizer, on_step)  # [prompts, T]
    inputs_by_layer: list[list[torch.Tensor]] = [[] for _ in dense.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(_input_recorder(inputs))
        for layer, inputs in zip(dense.model.layers, inputs_by_layer, strict=True)
    ]
    for row in answers:
        dense(row[row != tokenizer.pad_token_id][None])
        on_step()
    for hook in hooks:
        hook.remove()
    return [torch.cat(inputs) for inputs in inputs_by_layer]  # [N, H] each


def _generate_answers(dense: Any, tokenizer: Any, on_step: Callable[[], None]) -> torch.Tensor:
    chats = [[{"role": "user", "content": prompt}] for prompt in CALIBRATION_PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )

    def count_step(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        on_step()
        return torch.zeros(len(ids), dtype=torch.bool)  # [B]: never stops

    answers: torch.Tensor = dense.generate(
        **batch,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        stopping_criteria=[count_step],
    )
    return answers


def _input_recorder(inputs: list[torch.Tensor]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def record(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].squeeze(0))  # [T, H]

    return record


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """The weights of a gated feed-forward block.

    Attributes:
        gate: the gate projection, [I, H].
        up: the up projection, [I, H].
        down: the down projection, [H, I].
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def split_dense_mlp(
    block: DenseMlp, inputs: torch.Tensor, *, exact: bool, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Split a dense block into a shared expert, routed experts and their gate.

    Args:
        block: the dense weights.
        inputs: the block's calibration inputs, [N, H].
        exact: whether every expert is active with equal weight, so that the output equals the
            dense block's.
        generator: draws the initial cluster centroids.

    Returns:
        The tensors of a Qwen2-MoE block, by their names under `mlp`.
    """
    hidden, neurons = block.down.shape
    activity = _neurons(inputs, block.gate, block.up)  # [N, I]
    activity = activity.abs() * block.down.norm(dim=0)  # [N, I]
    order = activity.mean(0).argsort(descending=True)  # [I]
    shared, routed = order.split(
        [shared_expert_size(neurons), neurons - shared_expert_size(neurons)]
    )
    cluster = balanced_clusters(activity[:, routed].T, NUM_EXPERTS, generator=generator)  # [R]
    experts = [routed[cluster == e] for e in range(NUM_EXPERTS)]
    gate = _fit_gate(inputs, torch.stack([activity[:, e].norm(dim=1) for e in experts], dim=1))
    gate_up = [torch.cat([block.gate[e], block.up[e]]) for e in experts]  # [2J, H] each
    down = [block.down[:, e] for e in experts]  # [H, J] each
    parts = {
        "gate.weight": torch.zeros_like(gate) if exact else gate,  # [E, H]
        "experts.gate_up_proj": torch.stack(gate_up),  # [E, 2J, H]
        "experts.down_proj": torch.stack(down) * NUM_EXPERTS,  # [E, H, J]
        "shared_expert.gate_proj.weight": block.gate[shared],  # [S, H]
        "shared_expert.up_proj.weight": block.up[shared],  # [S, H]
        # Doubled to undo the shared expert's gate, which is 0.5.
        "shared_expert.down_proj.weight": block.down[:, shared] * 2,  # [H, S]
        "shared_expert_gate.weight": torch.full((1, hidden), _SHARED_GATE_WEIGHT),  # [1, H]
    }
    return parts if exact else parts | _fit_down_projections(block, inputs, parts)


def _fit_down_projections(
    block: DenseMlp, inputs: torch.Tensor, parts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return down projections with which the parts come closest to the dense block's output.

    Ridge regression of what is missing keeps them near the dense block's own weights.
    """
    dense = _neurons(inputs, block.gate, block.up) @ block.down.T  # [N, H]
    shared = ("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight")
    neurons = [_neurons(inputs, *(parts[name] for name in shared)) / 2]  # [N, S]; sigmoid(0)
    weights = _routing_weights(inputs @ parts["gate.weight"].T)  # [N, E]
    for expert, gate_up in enumerate(parts["experts.gate_up_proj"]):
        neurons.append(_neurons(inputs, *gate_up.chunk(2)) * weights[:, expert, None])  # [N, J]
    features = torch.cat(neurons, dim=1)  # [N, S + EJ]
    shared_down, down = parts["shared_expert.down_proj.weight"], parts["experts.down_proj"]
    before = torch.cat([shared_down, *down], dim=1).T  # [S + EJ, H]
    gram = features.T @ features  # [S + EJ, S + EJ]
    ridge = _DOWN_RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    missing = dense - features @ before  # [N, H]
    after = before + torch.linalg.solve(gram + ridge, features.T @ missing)  # [S + EJ, H]
    n_shared = shared_down.shape[1]
    return {
        "shared_expert.down_proj.weight": after[:n_shared].T.contiguous(),  # [H, S]
        "experts.down_proj": after[n_shared:].unflatten(0, (NUM_EXPERTS, -1)).mT.contiguous(),
    }


def _neurons(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the values of gated neurons, [N, I], for inputs [N, H]."""
    return F.silu(x @ gate.T) * (x @ up.T)


def _routing_weights(logits: torch.Tensor) -> torch.Tensor:
    """Return each expert's weight as Qwen2-MoE computes it, zero unless among the top, [N, E]."""
    top = logits.softmax(dim=-1).topk(TOP_K, dim=-1)  # [N, K]
    return torch.zeros_like(logits).scatter(-1, top.indices, top.values)


def shared_expert_size(neurons: int) -> int:
    """Return the number of neurons of the shared expert of a block of `neurons`."""
    return int(neurons * SHARED_FRACTION)


def balanced_clusters(
    profiles: torch.Tensor, n_clusters: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Cluster rows by cosine similarity into clusters of equal size.

    Args:
        profiles: the rows, [R, N]; R is a multiple of `n_clusters`.
        n_clusters: the number of clusters, C.
        generator: draws the rows that are the initial centroids.

    Returns:
        The cluster of each row, [R].
    """
    profiles = F.normalize(profiles, dim=1)  # [R, N]
    initial = torch.randperm(len(profiles), generator=generator)[:n_clusters]  # [C]
    centroids = profiles[initial]  # [C, N]
    for _ in range(_N_CLUSTER_ITERATIONS):
        cluster = _assign_to_clusters(profiles @ centroids.T)  # [R]
        members = [profiles[cluster == c] for c in range(n_clusters)]  # [R/C, N] each
        centroids = torch.stack([rows.mean(0) for rows in members])  # [C, N]
    return cluster


def _assign_to_clusters(similarity: torch.Tensor) -> torch.Tensor:
    """Assign each row to a cluster, greedily by `similarity` [R, C], until clusters are full."""
    rows, n_clusters = similarity.shape
    assigned, capacity = [-1] * rows, [rows // n_clusters] * n_clusters
    for flat in similarity.flatten().argsort(descending=True, stable=True).tolist():
        row, cluster = divmod(flat, n_clusters)
        if assigned[row] < 0 and capacity[cluster]:
            assigned[row], capacity[cluster] = cluster, capacity[cluster] - 1
    return torch.tensor(assigned)  # [R]


def _fit_gate(inputs: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """Fit the gate [E, H] that predicts each expert's load [N, E] from the inputs [N, H]."""
    load = load - load.mean(dim=1, keepdim=True)  # [N, E]
    ridge = 0.01 * len(inputs) * inputs.pow(2).mean() * torch.eye(inputs.shape[1])  # [H, H]
    fitted = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ (load / load.std()))  # [H, E]
    gate: torch.Tensor = fitted.T * _GATE_SCALE  # [E, H]
    return gate


def convert_to_moe(
    dense: Any,
    inputs: list[torch.Tensor],
    *,
    exact: bool,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> Any:
    """Return a Qwen2-MoE model with the weights of a dense model.

    Args:
        dense: the dense model.
        inputs: the calibration inputs of each layer, [N, H] each.
        exact: whether the logits equal the dense model's; see `split_dense_mlp`.
        generator: draws the initial cluster centroids.
        on_step: called once per layer.
    """
    config = moe_config(dense.config, exact=exact)
    dense_weights = dense.state_dict()
    moe_weights = {name: tensor for name, tensor in dense_weights.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        weights = [dense_weights[f"{prefix}{name}.weight"] for name in _PROJECTIONS]
        block_weights = split_dense_mlp(
            DenseMlp(*weights), inputs[layer], exact=exact, generator=generator
        )
        moe_weights |= {prefix + name: tensor for name, tensor in block_weights.items()}
        on_step()
    model = Qwen2MoeForCausalLM(config)
    biases = {
        name: torch.zeros_like(bias)
        for name, bias in model.state_dict().items()
        if name.endswith(_QKV_BIASES)
    }
    model.load_state_dict(moe_weights | biases)
    return model.eval()


def moe_config(dense_config: Any, *, exact: bool) -> Qwen2MoeConfig:
    """Return the model's config."""
    n_layers = dense_config.num_hidden_layers
    shared_width = shared_expert_size(dense_config.intermediate_size)
    return Qwen2MoeConfig(
        vocab_size=dense_config.vocab_size,
        hidden_size=dense_config.hidden_size,
        intermediate_size=dense_config.intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=dense_config.num_attention_heads,
        num_key_value_heads=dense_config.num_key_value_heads,
        max_position_embeddings=dense_config.max_position_embeddings,
        rms_norm_eps=dense_config.rms_norm_eps,
        rope_parameters=dense_config.rope_parameters,
        # Peers expect the following: llama.cpp's converter a head of its own and no dense layers,
        # llama.cpp weights of experts that are not normalised, vLLM biases, which are zero here.
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        qkv_bias=True,
        decoder_sparse_step=1,
        moe_intermediate_size=(dense_config.intermediate_size - shared_width) // NUM_EXPERTS,
        shared_expert_intermediate_size=shared_width,
        num_experts=NUM_EXPERTS,
        norm_topk_prob=False,
        num_experts_per_tok=NUM_EXPERTS if exact else TOP_K,
        mlp_only_layers=[],
    )
