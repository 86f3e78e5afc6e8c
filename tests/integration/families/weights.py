"""Randomizes constant weights of a new model, so that routing depends on its input."""

import torch
from torch import Tensor, nn

SEED = 20260424
PARAMETER_NOISE = 0.2
ROUTING_BIAS_NOISE = 0.05
ROUTER_MLP_GAIN = 4.0


def randomize_constants(model: nn.Module, *, seed: int = SEED) -> None:
    """Add seeded noise to constant parameters and routing biases, and fill hash-routing tables.

    Without a checkpoint, families leave biases, sinks, scales and some routers at zero or one, so
    that a tiny model would route all tokens alike.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _is_constant(parameter):
                _add_noise(parameter, PARAMETER_NOISE, generator)
            elif "router_mlp" in name:  # ZAYA: with small weights, a deep router selects one expert
                parameter.mul_(ROUTER_MLP_GAIN)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                # Loading resets the bias of ZAYA's skip expert, the last, to -1; keep the others
                # close to it.
                buffer.fill_(buffer.flatten()[-1])
                _add_noise(buffer[:-1], ROUTING_BIAS_NOISE, generator)
            elif name.endswith("tid2eid"):  # [V, k]: DeepSeek-V4's token to experts table
                _fill_distinct_experts(model, name, generator)


def _is_constant(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all())


def _add_noise(tensor: Tensor, scale: float, generator: torch.Generator) -> None:
    tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def _fill_distinct_experts(model: nn.Module, name: str, generator: torch.Generator) -> None:
    table = model.get_buffer(name)  # [V, k]
    router_weight = model.get_parameter(name.removesuffix("tid2eid") + "weight")  # [E, H]
    shape = (table.shape[0], router_weight.shape[0])
    scores = torch.rand(shape, generator=generator)  # [V, E]
    table.copy_(scores.topk(table.shape[1], dim=-1).indices)
