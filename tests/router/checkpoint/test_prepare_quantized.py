"""Quantised stores: what is quantised, what it lost, and how another request is answered."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faasmoe_contracts.store import QuantizationEntry, Store
from faasmoe_expert.functions.dequantization import dequantize
from faasmoe_router.checkpoint.__main__ import main
from faasmoe_router.checkpoint.prepare import find_complete_store, prepare
from faasmoe_router.checkpoint.store_plan import TensorSpec, plan_router_files
from faasmoe_router.checkpoint.store_writer import StoreFolder
from faasmoe_router.checkpoint.termination_message import model_status
from faasmoe_router.errors import SourceUnsupported, StoreMismatch

MakeCheckpoint = Callable[..., Path]
TinyModel = Callable[..., Any]
INT8 = QuantizationEntry("int8", "int8")


def dequantized(store: Store) -> dict[str, torch.Tensor]:
    """Return every quantised parameter, dequantised, by its name in the model."""
    weights: dict[str, torch.Tensor] = {}
    for layer in store.manifest.layers:
        tensors = load_file(store.path / layer.file)
        for name, entry in layer.quantization.items():
            weight = dequantize(tensors[name], tensors[f"{name}_scale"], entry)
            weights[f"{layer.name}.{name}"] = weight
    router = {n: t for path in store.router_files() for n, t in load_file(path).items()}
    for module, entry in store.manifest.router.quantized.items():
        name = f"{module}.weight"
        weights[name] = dequantize(router[name], router[f"{name}_scale"], entry)
    return weights


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize(
    ("quantization", "bound"),
    [
        (QuantizationEntry("int8", "int8"), 0.01),
        (QuantizationEntry("int4", "int4"), 0.11),
        (QuantizationEntry("mxfp4", "none"), 0.13),
    ],
    ids=str,
)
def test_stores_codes_near_the_weights_and_says_how_near(
    make_checkpoint: MakeCheckpoint,
    tiny_model: TinyModel,
    tmp_path: Path,
    family: str,
    quantization: QuantizationEntry,
    bound: float,
) -> None:
    checkpoint = make_checkpoint(family)
    store = prepare(str(checkpoint), tmp_path / "store", quantization=quantization)
    assert store.manifest.quantization == quantization
    original, weights = tiny_model(family).state_dict(), dequantized(store)
    entries = {
        f"{layer.name}.{name}": entry
        for layer in store.manifest.layers
        for name, entry in layer.quantization.items()
    } | {f"{name}.weight": entry for name, entry in store.manifest.router.quantized.items()}
    assert set(entries) == set(weights)
    for name, entry in entries.items():
        norm = original[name].norm().item()
        error = (weights[name] - original[name]).norm().item()
        assert entry.norm == pytest.approx(norm, rel=1e-5)
        assert entry.relative_error == pytest.approx(error / norm, rel=1e-3)
        assert entry.relative_error < bound
    for layer in store.manifest.layers:
        mapped = store.map_layer(layer.index)
        assert mapped.size_bytes == layer.expert_bytes * layer.num_experts + layer.shared_bytes


def test_quantises_the_routers_linear_layers_only(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    quantization = QuantizationEntry(router="int4")
    store = prepare(str(make_checkpoint("qwen2_moe")), tmp_path / "tied", quantization=quantization)
    modules = set(store.manifest.router.quantized)
    layer = "model.layers.0"
    assert f"{layer}.self_attn.q_proj" in modules
    assert f"{layer}.mlp.shared_expert.down_proj" in modules
    assert not any("gate." in f"{name}." or "embed" in name for name in modules)
    assert "lm_head" not in modules  # its weight is the embedding's
    assert not any(layer.quantization for layer in store.manifest.layers)
    untied = make_checkpoint("qwen2_moe", name="untied", tie_word_embeddings=False)
    store = prepare(str(untied), tmp_path / "store", quantization=quantization)
    quantized = store.manifest.router.quantized
    assert quantized["lm_head"].scheme == "int8"
    assert {entry.scheme for name, entry in quantized.items() if name != "lm_head"} == {"int4"}


def test_columns_that_do_not_fit_keep_their_floats(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = make_checkpoint("qwen2_moe")  # experts are 24 wide
    store = prepare(str(checkpoint), tmp_path / "s", quantization=QuantizationEntry("mxfp4"))
    layer = store.manifest.layers[0]
    assert set(layer.quantization) == {"gate_up_proj"}
    assert store.map_layer(0).tensors["down_proj"].dtype == "F32"
    assert "2 expert parameters are not quantised, their columns do not fit mxfp4" in caplog.text
    assert "down_proj" in caplog.text


def test_a_resumed_preparation_knows_the_errors_of_finished_files(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(make_checkpoint("mixtral"))
    whole = prepare(checkpoint, tmp_path / "whole", quantization=INT8).manifest
    record = StoreFolder.record_finished
    n_finished = 0

    def record_and_fail(*arguments: Any) -> None:
        nonlocal n_finished
        record(*arguments)
        n_finished += 1
        if n_finished == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreFolder, "record_finished", record_and_fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(checkpoint, tmp_path / "resumed", quantization=INT8)
    resumed = prepare(checkpoint, tmp_path / "resumed", quantization=INT8).manifest
    assert resumed == whole
    assert all(e.norm > 0 for layer in resumed.layers for e in layer.quantization.values())


def test_a_store_of_another_quantisation_is_refused_and_replaced_by_force(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, folder = str(make_checkpoint("mixtral")), tmp_path / "store"
    plain = prepare(checkpoint, folder)
    message = r"expected .* as it is now, quantisation: experts int8, router int8; --force"
    with pytest.raises(StoreMismatch, match=message):
        prepare(checkpoint, folder, quantization=INT8)
    request: dict[str, Any] = {"revision": None, "dtype": None}
    assert find_complete_store(checkpoint, folder, **request) == plain
    with pytest.raises(StoreMismatch, match="experts int8"):
        find_complete_store(checkpoint, folder, **request, quantization=INT8)
    prepare(checkpoint, folder, quantization=INT8, force=True)
    assert find_complete_store(checkpoint, folder, **request, quantization=INT8) is not None
    with pytest.raises(StoreMismatch, match="quantisation: experts int8, router int8"):
        prepare(checkpoint, folder)


def test_not_finite_weights_are_an_error(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("mixtral")
    (file,) = checkpoint.glob("*.safetensors")
    from safetensors.torch import save_file

    tensors = load_file(file)
    name = next(name for name in tensors if "experts" in name)
    tensors[name][0, 0] = math.inf
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        SourceUnsupported, match=rf"{re.escape(name)}.* NaN or infinite, expected finite weights"
    ):
        prepare(str(checkpoint), tmp_path / "store", quantization=INT8)


def test_the_command_reports_errors_per_layer_and_in_all(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(make_checkpoint("mixtral"))
    options = ["--quantize", "int4", "--quantize-router", "int8"]
    assert main(["prepare", checkpoint, str(tmp_path / "store"), *options]) == 0
    output = capsys.readouterr().out.splitlines()[2:]
    lines = [line for line in output if not line.startswith("weights: ")]
    assert [line.partition(",")[0] for line in lines] == [
        "layer 0: int4",
        "layer 1: int4",
        "experts: int4 (lossy)",
        "router: int8",
    ]
    errors = [float(line.rpartition(" ")[2]) for line in lines]
    assert 0.05 < errors[2] < 0.12
    assert errors[3] < 0.01
    with pytest.raises(SystemExit):
        main(["prepare", checkpoint, str(tmp_path / "store"), "--quantize", "int3"])


def test_the_termination_message_names_what_is_quantised(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = str(make_checkpoint("mixtral"))
    status = model_status(prepare(checkpoint, tmp_path / "int8", quantization=INT8).manifest)
    assert status["expertsQuantization"] == status["routerQuantization"] == "int8"
    assert 0 < status["routerQuantizedBytes"] < status["routerBytes"]
    plain = model_status(prepare(checkpoint, tmp_path / "plain").manifest)
    assert not any("uantiz" in field for field in plain)


def test_scales_are_in_the_file_of_their_codes() -> None:
    specs = [
        TensorSpec(name, name, torch.int8, (size,))
        for name, size in (("a", 60), ("b", 40), ("b_scale", 4), ("c", 90), ("c_scale", 20))
    ]
    files = [set(layout.offsets) for layout in plan_router_files(specs, shard_bytes=100)]
    assert files == [{"a", "b", "b_scale"}, {"c", "c_scale"}]
