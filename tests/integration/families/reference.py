"""Reference models in float32 with the weights of a store, dequantised."""

from collections.abc import Mapping

import torch
from families.registry import Family
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from faasmoe_contracts.store import Store, TensorQuantization

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])


def upcast_model(family: Family, store: Store) -> PreTrainedModel:
    """Return the family's whole model in float32, with the weights of the store."""
    model = family.build()
    router = {
        f"{module}.weight": entry for module, entry in store.manifest.router.quantized.items()
    }
    for path in store.router_files():
        model.load_state_dict(_dequantised(load_file(path), router), strict=False)
    for layer in store.manifest.layers:
        experts = _dequantised(load_file(store.path / layer.file), layer.quantization)
        model.get_submodule(layer.name).load_state_dict(experts)
    model.tie_weights()
    return model


def _dequantised(
    tensors: dict[str, Tensor], quantization: Mapping[str, TensorQuantization]
) -> dict[str, Tensor]:
    weights = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    for name, entry in quantization.items():
        scales = weights.pop(f"{name}_scale")
        weights[name] = reference_weights(tensors[name], scales, entry)
    return weights


def reference_weights(codes: Tensor, scales: Tensor, entry: TensorQuantization) -> Tensor:
    """Return the weights of codes and scales as docs/store.md defines them, element by element."""
    if entry.scheme == "int8":
        values = codes.float()
    else:
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()
        values = nibbles - 8.0 if entry.scheme == "int4" else E2M1[nibbles]
    if entry.scale_dtype == "e8m0":
        scales = 2.0 ** (scales.float() - 127)
    weights = values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], dim=-1)
    return weights.transpose(-1, -2) if entry.transposed else weights
