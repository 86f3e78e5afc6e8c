"""A router over quantised weights: its logits, and damaged stores."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families.inputs import prompts
from families.reference import upcast_model
from families.registry import FAMILIES, forward_logits
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store, manifest_digest
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.model_loader import ModelLoadError, load_router_model

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def local_dispatcher(store: Store) -> Dispatcher:
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 8))
    return Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_logits_equal_those_of_the_dequantised_weights(
    scheme: str, prepared_store: PreparedStore
) -> None:
    store = prepared_store("qwen2_moe", router=scheme)
    model: Any = load_router_model(store, local_dispatcher(store), device=CPU)
    family = next(family for family in FAMILIES if family.name == "qwen2_moe")
    expected = forward_logits(family, upcast_model(family, store), prompts())  # [B, S, V]
    got = forward_logits(family, model, prompts())
    assert (got - expected).abs().max() <= 2e-3
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_codes_of_a_wrong_size_are_an_error(prepared_store: PreparedStore, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(prepared_store("qwen2_moe", router="int8").path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["router"]["quantized"][Q_PROJ]["shape"] = [32, 64]
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    store = Store.open(folder)
    message = r"q_proj.weight: got I8 \[32, 32\], expected I8 \[32, 64\]: int8 codes of \[32, 64\]"
    with pytest.raises(ModelLoadError, match=message):
        load_router_model(store, local_dispatcher(store), device=CPU)
