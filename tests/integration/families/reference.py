"""Reference for routers that compute in float32 over a store of another dtype."""

from families.registry import Family
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from faasmoe_contracts.store import Store


def upcast_model(family: Family, store: Store) -> PreTrainedModel:
    """Return the family's whole model in float32, with the weights of the store."""
    model = family.build()
    for path in store.router_files():
        model.load_state_dict(_upcast(load_file(path)), strict=False)
    for layer in store.manifest.layers:
        experts = _upcast(load_file(store.path / layer.file))
        model.get_submodule(layer.name).load_state_dict(experts)
    model.tie_weights()
    return model


def _upcast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
