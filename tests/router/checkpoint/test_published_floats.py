"""Checkpoints published in fp8, mxfp8 and mxfp4 hold the weights that their writer meant."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published.checkpoints import Published, Write, build, publish
from published.comparison import assert_same_weights, stored_weights
from published.floats import deepseek_v4, fp8_blocks, fp8_scaled, gpt_oss, mxfp8

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_contracts.store.references import StoreMode
from faasmoe_router.checkpoint.__main__ import describe_quantization
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.store_writer import StoreFolder
from faasmoe_router.errors import SourceUnsupported

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
ROWS: dict[str, Any] = {"quant_method": "fbgemm_fp8"}
BLOCK_SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384}
FORMATS: dict[str, tuple[str, Write, dict[str, Any], dict[str, Any]]] = {
    "fp8-deepseek": ("deepseek_v3", fp8_blocks(), FP8, BLOCK_SIZES),
    "fp8-qwen": ("qwen3_moe", fp8_blocks(), FP8, BLOCK_SIZES),
    "fp8-uneven": ("qwen3_moe", fp8_blocks(), FP8, {"moe_intermediate_size": 160}),
    "fp8-odd-columns": (
        "qwen3_moe",
        fp8_blocks(block=48),
        FP8 | {"weight_block_size": [48, 48]},
        {},
    ),
    "fp8-row": ("mixtral", fp8_scaled("row"), ROWS, {}),
    "fp8-row-bf16": ("mixtral", fp8_scaled("row", dtype=torch.bfloat16), ROWS, {}),
    "fp8-tensor": (
        "qwen3_moe",
        fp8_scaled("tensor", suffix="weight_scale_inv"),
        FP8 | {"weight_block_size": None},
        {},
    ),
    "mxfp8": (
        "qwen3_moe",
        mxfp8(),
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        {},
    ),
    "mxfp8-e8m0": (
        "qwen3_moe",
        mxfp8(dtype=torch.float8_e8m0fnu),
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        {},
    ),
    "fp4-experts": (
        "deepseek_v4",
        deepseek_v4(),
        FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"},
        {"moe_intermediate_size": 128, "hidden_size": 128},
    ),
    "mxfp4": ("gpt_oss", gpt_oss(), {"quant_method": "mxfp4"}, {}),
}
KEPT = {
    **dict.fromkeys(FORMATS, "fp8"),
    "mxfp4": "mxfp4",
    "fp4-experts": "mxfp4",
    "fp8-odd-columns": None,
}
LOADED_BY_TRANSFORMERS = ("fp8-deepseek", "fp8-qwen", "fp8-tensor", "mxfp8", "fp4-experts", "mxfp4")

formats = pytest.mark.parametrize("name", FORMATS)


def published(name: str, folder: Path) -> Published:
    family, write, config, sizes = FORMATS[name]
    return publish(build(family, **sizes), folder, write, config)


@formats
def test_holds_the_weights_that_the_writer_meant(name: str, tmp_path: Path) -> None:
    checkpoint = published(name, tmp_path)
    store = prepare(str(checkpoint.folder), tmp_path / "store")
    expected = prepare(str(checkpoint.reference), tmp_path / "expected")
    assert_same_weights(stored_weights(store), stored_weights(expected))
    assert not store.manifest.quantization
    schemes = {e.scheme for layer in store.manifest.layers for e in layer.quantization.values()}
    assert schemes == ({KEPT[name]} if KEPT[name] else set())
    assert "quant" not in (store.path / "model" / "config.json").read_text()


@pytest.mark.parametrize("name", LOADED_BY_TRANSFORMERS)
@pytest.mark.filterwarnings("ignore")
def test_holds_the_weights_that_from_pretrained_loads(name: str, tmp_path: Path) -> None:
    checkpoint = published(name, tmp_path)
    store = prepare(str(checkpoint.folder), tmp_path / "store")
    model_class = getattr(transformers, store.manifest.model.architecture)
    model = model_class.from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    # In float32, since transformers does not keep DeepSeek-V4's norms in float32 in fp8.
    expected = {n: t.float() for n, t in model.state_dict().items() if n not in tied}
    assert_same_weights({n: t.float() for n, t in stored_weights(store).items()}, expected)


@pytest.mark.parametrize("scheme", ["int8", "mxfp4"])
@pytest.mark.parametrize("name", ["fp8-qwen", "mxfp4"])
def test_quantises_again_only_to_another_scheme(name: str, scheme: str, tmp_path: Path) -> None:
    checkpoint = published(name, tmp_path)
    asked = QuantizationEntry(experts=scheme, router="int8")
    store = prepare(str(checkpoint.folder), tmp_path / "store", quantization=asked)
    expected = prepare(str(checkpoint.reference), tmp_path / "expected", quantization=asked)
    assert store.manifest.quantization == asked
    entries = [e for layer in store.manifest.layers for e in layer.quantization.values()]
    assert {entry.scheme for entry in entries} == {scheme}
    if name == scheme:  # its own codes: nothing is lost
        assert all(entry.relative_error == 0 for entry in entries)
        plain = prepare(str(checkpoint.reference), tmp_path / "plain")
        experts = {n: t for n, t in stored_weights(plain).items() if ".experts." in n}
        got = stored_weights(store)
        assert all(torch.equal(got[n], t) for n, t in experts.items())
    else:
        assert store.manifest.layers == expected.manifest.layers


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("mxfp4", ["experts: 6 weights in mxfp4 are kept as mxfp4: .* GB, 1.00 times"]),
        (
            "fp8-qwen",
            [
                "experts: 6 weights in fp8 128 x 128 are kept as fp8: .* 1.00 times",
                "router: 12 weights in fp8 128 x 128 are dequantised to bfloat16: .* 2.00 times",
            ],
        ),
        (
            "fp8-odd-columns",
            [
                "experts: 6 weights in fp8 48 x 48 are dequantised to bfloat16: .* 1.99 times",
                "router: 12 weights in fp8 48 x 48 are dequantised to bfloat16: .* 1.99 times",
            ],
        ),
        (
            "fp4-experts",
            [
                "experts: 6 weights in mxfp4 are kept as mxfp4: .* 1.00 times",
                "router: .* weights in fp8 128 x 128 are dequantised to bfloat16",
            ],
        ),
    ],
)
def test_says_what_becomes_of_the_codes_and_what_it_costs(
    name: str, lines: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = published(name, tmp_path)
    with caplog.at_level("INFO"):
        store = prepare(str(checkpoint.folder), tmp_path / "store")
    said = [message for message in caplog.messages if " weights in " in message]
    assert len(said) == len(lines)
    assert all(re.match(line, message) for line, message in zip(lines, said, strict=True))
    assert [str(entry) for entry in store.manifest.published] == said
    experts = store.manifest.published[0]
    n_layers = len(store.manifest.layers)
    assert (experts.part, experts.count) == ("experts", 2 * n_layers)
    assert all(".0-" in weight or f".{n_layers}" in weight for weight in experts.weights)
    layers = [line for line in describe_quantization(store.manifest) if line.startswith("layer")]
    assert len(layers) == (len(store.manifest.layers) if KEPT[name] else 0)
    assert all(line.endswith(f"{KEPT[name]}, as published") for line in layers)


@pytest.mark.parametrize("name", ["fp8-qwen", "fp8-tensor", "mxfp8-e8m0", "mxfp4", "fp4-experts"])
def test_by_reference_only_what_is_published_as_it_is_served_stays(
    name: str, tmp_path: Path
) -> None:
    folder = str(published(name, tmp_path).folder)
    copy = prepare(folder, tmp_path / "copied", mode=StoreMode.COPY)
    store = prepare(folder, tmp_path / "referring", mode=StoreMode.AUTO)
    assert store.manifest.published == copy.manifest.published
    entry = store.manifest.checkpoint
    assert entry is not None
    assert "model.embed_tokens.weight" in entry.router
    experts = {layer.name for layer in store.manifest.layers}
    copied = {name for names in entry.copied.values() for name in names}
    if name == "fp4-experts":  # not for its codes
        assert not entry.layers
        assert copied >= experts
        with pytest.raises(SourceUnsupported, match="DeepseekV4Experts is computed by its own mod"):
            prepare(folder, tmp_path / "strict", mode=StoreMode.REFERENCE)
        return
    assert len(entry.layers) == len(experts)
    assert not copied & experts
    for layer, other in zip(store.manifest.layers, copy.manifest.layers, strict=True):
        assert not layer.file
        assert layer.quantization == other.quantization
        got, expected = store.map_layer(layer.index), copy.map_layer(layer.index)
        assert set(got.tensors) == set(expected.tensors)
        for tensor, view in expected.tensors.items():
            pieces = got.tensors[tensor].pieces
            assert b"".join(piece.buffer for piece in pieces) == bytes(view.buffer)


def test_an_interrupted_preparation_resumes_with_its_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(published("mxfp4", tmp_path).folder)
    whole = prepare(checkpoint, tmp_path / "whole").manifest
    record, n_finished = StoreFolder.record_finished, 0

    def record_and_fail(*arguments: Any) -> None:
        nonlocal n_finished
        record(*arguments)
        n_finished += 1
        if n_finished == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreFolder, "record_finished", record_and_fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(checkpoint, tmp_path / "resumed")
    assert prepare(checkpoint, tmp_path / "resumed").manifest == whole
