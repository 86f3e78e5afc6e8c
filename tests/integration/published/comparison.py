"""Compares the weights of stores."""

from collections.abc import Callable

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
            parts = {suffix: tensors.pop(name + suffix) for suffix in entry.components}
            tensors[name] = reference_weights(parts, entry).to(dtype)
        weights |= {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}
    return weights


def assert_same_weights(
    got: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float = 0.0
) -> None:
    """Assert that names, dtypes and bits are the same; or values, to a relative error."""
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        expected_tensor = expected[name]
        torch.testing.assert_close(tensor, expected_tensor, rtol=rtol, atol=0, msg=_named(name))


def _named(name: str) -> Callable[[str], str]:
    """Return what puts a name before the message of a difference."""
    return lambda message: f"{name}: {message}"
