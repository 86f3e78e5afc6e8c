"""Compares the weights of stores."""

import torch
from families.reference import reference_weights
from safetensors.torch import load_file
from torch import Tensor

from faasmoe_contracts.store import Store


def stored_weights(store: Store) -> dict[str, Tensor]:
    """Return every tensor of a store by its name in the model, dequantised in the model's dtype."""
    dtype = getattr(torch, store.manifest.model.dtype)
    weights = {n: t for path in store.router_files() for n, t in load_file(path).items()}
    for layer in store.manifest.layers:
        tensors = load_file(store.path / layer.file)
        for name, entry in layer.quantization.items():
            scales = tensors.pop(f"{name}_scale")
            tensors[name] = reference_weights(tensors[name], scales, entry).to(dtype)
        weights |= {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}
    return weights


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that names, dtypes and bits are the same."""
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
