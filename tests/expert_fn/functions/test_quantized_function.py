"""Functions over codes and scales: what computes them, what they hold, and damaged stores."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import Store, StoreError, manifest_digest
from faasmoe_expert.errors import BlockCorrupted
from faasmoe_expert.functions import ExpertFunction, function
from faasmoe_expert.functions.stacks import QuantizedStack
from faasmoe_expert.functions.weights import map_weights
from faasmoe_kernels import KernelsUnavailable, load

Change = Callable[[dict[str, Any]], object]


def modified_store(store: Store, folder: Path, change: Change) -> Path:
    """Return a copy of a store with another manifest, whose digest is right."""
    shutil.copytree(store.path, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))
    return folder


def test_says_what_computes(prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def attached(family: str) -> str:
        store = prepared_store(family, experts="int8")
        return ExpertFunction(make_function_spec(store, [0], [0, 1]), store).kernel_name

    try:
        assert attached("gpt_oss") == f"native ({load().isa})"
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    assert attached("deepseek_v4") == "transformers (dequantises on use)"

    def unavailable() -> None:
        raise KernelsUnavailable("no compiler")

    monkeypatch.setattr(function, "load", unavailable)
    assert attached("gpt_oss") == "torch (no compiler, dequantises on use)"


def test_codes_and_scales_are_views_of_the_mapping(prepared_store: PreparedStore) -> None:
    store = prepared_store("mixtral", experts="int4")
    mapped, layer = store.map_layer(0), store.manifest.layers[0]
    weights = map_weights(mapped, n_experts=8, quantization=layer.quantization)
    assert set(weights.stacked) == {"gate_up_proj", "down_proj"}
    for name, stack in weights.stacked.items():
        assert isinstance(stack, QuantizedStack)
        for tensor, view in (
            (stack.codes, mapped.tensors[name]),
            (stack.scales, mapped.tensors[f"{name}_scale"]),
        ):
            assert isinstance(tensor, torch.Tensor)
            start = torch.frombuffer(view.buffer, dtype=torch.uint8).data_ptr()
            assert (tensor.data_ptr(), tuple(tensor.shape)) == (start, view.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "int5"}, "gate_up_proj.*scheme: got 'int5', expected one of int8"),
        ({"shape": [96, 64]}, r"gate_up_proj: got I8 \[8, 96, 32\], expected I8 \[8, 96, 64\]"),
        ({"scale_dtype": "float16"}, r"gate_up_proj_scale: got BF16 .*, expected F16"),
        ({"scheme": "int4"}, r"gate_up_proj: got I8 \[8, 96, 32\], expected U8 \[8, 96, 16\]"),
    ],
)
def test_names_what_is_wrong_in_the_manifest(
    change: dict[str, Any], message: str, prepared_store: PreparedStore, tmp_path: Path
) -> None:
    folder = modified_store(
        prepared_store("mixtral", experts="int8"),
        tmp_path / "store",
        lambda m: m["layers"][0]["quantization"]["gate_up_proj"].update(change),
    )
    with pytest.raises(StoreError, match=message):
        Store.open(folder).map_layer(0)


@pytest.mark.parametrize("tensor", ["gate_up_proj", "down_proj_scale"])
def test_digests_cover_codes_and_scales(
    tensor: str, prepared_store: PreparedStore, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(prepared_store("mixtral", experts="int8").path, folder)
    store = Store.open(folder)
    path, view = folder / store.manifest.layers[0].file, store.map_layer(0).tensors[tensor]
    content = bytearray(path.read_bytes())
    content[view.offset + 3] ^= 1  # in the first expert
    path.write_bytes(content)
    with pytest.raises(BlockCorrupted, match="expert 0"):
        ExpertFunction(make_function_spec(store, [0], [0, 1]), store)
    ExpertFunction(make_function_spec(store, [0], [1, 2]), store)
