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
    return load_dequantised(family.build(), store)


def load_dequantised(model: PreTrainedModel, store: Store) -> PreTrainedModel:
    """Load the weights of a store into a model in float32; return the model."""
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
        parts = {suffix: tensors[name + suffix] for suffix in entry.components}
        weights = {n: t for n, t in weights.items() if n not in {name + x for x in parts}}
        weights[name] = reference_weights(parts, entry)
    return weights


def reference_weights(parts: Mapping[str, Tensor], entry: TensorQuantization) -> Tensor:
    """Return the weights as docs/store.md defines them, element by element, in float32.

    `parts` are the codes and what lies beside them, by the suffix of their names.
    """
    codes, scales = parts[""], parts["_scale"]
    if entry.scheme in ("int8", "fp8"):
        values = codes.float()
    else:
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()
        values = nibbles.float() if entry.scheme == "int4" else E2M1[nibbles]
    rows, columns = entry.shape
    row, column = torch.arange(rows), torch.arange(columns)
    part = row // (rows // entry.parts)
    row_in_part = row % (rows // entry.parts)
    scale_row = part * (scales.shape[-2] // entry.parts) + row_in_part // entry.group_rows
    group = column // (entry.group or columns)
    if entry.scheme in ("int8", "int4"):
        unsigned = values + 128 if entry.scheme == "int8" else values
        middle = 128.0 if entry.scheme == "int8" else 8.0
        zeros = middle if entry.symmetric else parts["_zero_point"].float()[..., group]
        values = unsigned - zeros
    factors = 2.0 ** (scales.float() - 127) if entry.scale_dtype == "e8m0" else scales.float()
    per_weight = factors[..., scale_row, :][..., group]  # [..., N, K]
    if entry.scheme == "nvfp4":
        per_weight = per_weight * parts["_global_scale"][..., part, :]
    weights = values * per_weight
    return weights.transpose(-1, -2) if entry.transposed else weights
