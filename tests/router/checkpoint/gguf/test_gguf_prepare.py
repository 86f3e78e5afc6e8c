"""Stores of GGUF files in every type: each tensor, the config, the tokenizer, and the logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from families.reference import _dequantised
from gguf_models import GGUF_FAMILIES, Tensors, build_model, file_tensors, write_gguf
from safetensors.torch import load_file
from tiny_chat import tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from faasmoe_contracts.store import QuantizationEntry, Store
from faasmoe_router.checkpoint.gguf.ggml_types import GGML_TYPES, KEPT_SCHEMES
from faasmoe_router.checkpoint.prepare import find_complete_store, prepare

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"),
    *K_QUANTS,
)
ARCHITECTURES = tuple(GGUF_FAMILIES)
DTYPES = {"F32": "float32", "F16": "float16"}


def make_file(path: Path, architecture: str, type_name: str) -> tuple[Path, Tensors]:
    family = GGUF_FAMILIES[architecture]
    model = build_model(family)
    tensors = file_tensors(family, model, type_name)
    return write_gguf(path, family, model, tensors.blocks), tensors


def stored_weights(store: Store) -> dict[str, Tensor]:
    """Return every weight of a store in float32, dequantised, by its name in the model."""
    router = {f"{m}.weight": entry for m, entry in store.manifest.router.quantized.items()}
    weights: dict[str, Tensor] = {}
    for path in store.router_files():
        weights |= _dequantised(load_file(path), router)
    for layer in store.manifest.layers:
        experts = _dequantised(load_file(store.path / layer.file), layer.quantization)
        weights |= {f"{layer.name}.{name}": tensor for name, tensor in experts.items()}
    return weights


@pytest.mark.parametrize(
    ("architecture", "type_name"),
    [
        *(("qwen2moe", type_name) for type_name in TYPES),
        *(
            (architecture, type_name)
            for architecture in ARCHITECTURES[1:]
            for type_name in ("BF16", "Q8_0", "Q4_0", "MXFP4", "Q4_K")
        ),
    ],
)
def test_stores_every_tensor_as_gguf_decodes_it(
    tmp_path: Path, architecture: str, type_name: str
) -> None:
    path, tensors = make_file(tmp_path / "model.gguf", architecture, type_name)
    store = prepare(str(path), tmp_path / "store")
    assert store.manifest.model.dtype == DTYPES.get(type_name, "bfloat16")
    dtype = getattr(torch, store.manifest.model.dtype)
    got = stored_weights(store)
    assert set(got) == set(tensors.weights)
    for name, expected in tensors.weights.items():
        is_kept = ".experts." in name and not name.endswith("bias") and type_name in KEPT_SCHEMES
        rounded = expected if is_kept else expected.to(dtype).float()
        assert torch.equal(got[name], rounded), name
    for layer in store.manifest.layers:
        entries = layer.quantization.values()
        schemes = {(entry.scheme, entry.scale_dtype) for entry in entries}
        assert schemes == ({KEPT_SCHEMES[type_name]} if type_name in KEPT_SCHEMES else set())
        assert all(entry.relative_error == 0.0 for entry in entries)


def test_reads_the_types_that_the_tests_write_and_those_of_gguf() -> None:
    names = {kind.name for kind in GGML_TYPES.values()}
    assert set(TYPES) <= names
    for kind in GGML_TYPES.values():
        number = gguf.GGMLQuantizationType[kind.name]
        assert (number, gguf.GGML_QUANT_SIZES[number]) == (
            kind.number,
            (kind.block_elements, kind.block_bytes),
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_is_that_of_the_model(tmp_path: Path, architecture: str) -> None:
    path, _ = make_file(tmp_path / "model.gguf", architecture, "Q8_0")
    store = prepare(str(path), tmp_path / "store")
    got = AutoConfig.from_pretrained(store.path / "model").to_dict()
    expected = build_model(GGUF_FAMILIES[architecture]).config.to_dict()
    ignored = {"_name_or_path", "architectures", "dtype", "head_dim", "initializer_range"}
    ignored |= {"transformers_version"}
    ignored |= {"intermediate_size"} if "moe_intermediate_size" in expected else set()
    different = {
        name: (got.get(name), value)
        for name, value in expected.items()
        if name not in ignored and got.get(name) != value
    }
    assert different == {}


@pytest.mark.parametrize("architecture", ["qwen2moe", "qwen3moe", "minimax-m2"])
def test_logits_equal_those_of_from_pretrained(tmp_path: Path, architecture: str) -> None:
    """With our config: transformers' reader leaves out the experts' width.

    It cannot read GPT-OSS: llama.cpp names the experts' tensors otherwise than it expects.
    """
    path, _ = make_file(tmp_path / "model.gguf", architecture, "Q8_0")
    store = prepare(str(path), tmp_path / "store", dtype="float32")
    config = AutoConfig.from_pretrained(store.path / "model")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(stored_weights(store))
    prompt = torch.arange(40)[None]  # [1, S]
    with torch.no_grad():
        expected, got = reference(prompt).logits, model(prompt).logits  # [1, S, V]
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_tokenizer_and_template_are_those_of_from_pretrained(tmp_path: Path) -> None:
    path, _ = make_file(tmp_path / "model.gguf", "qwen2moe", "Q8_0")
    store = prepare(str(path), tmp_path / "store")
    got = AutoTokenizer.from_pretrained(store.path / "model")
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "the quick brown fox<|im_end|> jumps äöü 東京 over  the lazy dog\n"
    assert (
        got(text)["input_ids"] == expected(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    )
    assert got.decode(got(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "the fox"}]
    rendered = got.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert got.eos_token == expected.eos_token == "<|end|>"
    generation = json.loads((store.path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]  # <|end|> and <|im_end|>


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (QuantizationEntry("int8", "int8"), {"int8": "float16"}),
        (QuantizationEntry("none", "int8"), {"int8": "float16"}),
        (QuantizationEntry("int4", "none"), {"int4": "bfloat16"}),
    ],
    ids=str,
)
def test_quantises_only_what_is_not_published_so(
    tmp_path: Path, asked: QuantizationEntry, kept: Mapping[str, str]
) -> None:
    """Codes of the asked scheme are kept; others are quantised again, which loses something."""
    path, tensors = make_file(tmp_path / "model.gguf", "qwen2moe", "Q8_0")
    store = prepare(str(path), tmp_path / "store", quantization=asked)
    assert store.manifest.quantization == asked
    entries = [e for layer in store.manifest.layers for e in layer.quantization.values()]
    assert {entry.scheme: entry.scale_dtype for entry in entries} == dict(kept)
    weights = stored_weights(store)
    for name in ("model.layers.0.mlp.experts.down_proj", "model.layers.1.self_attn.q_proj.weight"):
        is_expert = ".experts." in name
        scheme = asked.experts if is_expert else asked.router
        if is_expert and asked.experts == "int4":
            assert not torch.equal(weights[name], tensors.weights[name])
        elif scheme == "none" and not is_expert:
            assert torch.equal(weights[name], tensors.weights[name].bfloat16().float())
        else:
            assert torch.equal(weights[name], tensors.weights[name])
    gates = [m for m in store.manifest.router.quantized if m.endswith("mlp.gate")]
    assert gates == []


def test_mixed_types_of_gate_and_up_are_decoded(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["qwen3moe"]
    model = build_model(family)
    tensors = file_tensors(family, model, "Q8_0")
    other = file_tensors(family, model, "Q4_0")
    name = "blk.1.ffn_up_exps.weight"
    tensors.blocks[name] = other.blocks[name]
    path = write_gguf(tmp_path / "model.gguf", family, model, tensors.blocks)
    store = prepare(str(path), tmp_path / "store")
    assert set(store.manifest.layers[0].quantization) == {"gate_up_proj", "down_proj"}
    assert set(store.manifest.layers[1].quantization) == {"down_proj"}
    target = "model.layers.1.mlp.experts.gate_up_proj"
    expected = tensors.weights[target].clone()
    expected[:, 256:] = other.weights[target][:, 256:]
    assert torch.equal(stored_weights(store)[target], expected.bfloat16().float())


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["qwen2moe"]
    model = build_model(family, tie_word_embeddings=True)
    tensors = file_tensors(family, model, "Q8_0")
    del tensors.blocks["output.weight"]
    path = write_gguf(tmp_path / "model.gguf", family, model, tensors.blocks)
    store = prepare(str(path), tmp_path / "store")
    assert "lm_head.weight" not in stored_weights(store)
    assert AutoConfig.from_pretrained(store.path / "model").tie_word_embeddings


def test_reads_all_parts_of_a_split_checkpoint(tmp_path: Path) -> None:
    family = GGUF_FAMILIES["qwen3moe"]
    model = build_model(family)
    tensors = file_tensors(family, model, "Q8_0")
    write_gguf(tmp_path / "model", family, model, tensors.blocks, split_max_tensors=9)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) > 2
    whole = write_gguf(tmp_path / "whole.gguf", family, model, tensors.blocks)
    expected = prepare(str(whole), tmp_path / "expected")
    for source in (parts[0], parts[-1]):
        store = prepare(f"file://{source}", tmp_path / f"store-{source.stem}")
        assert [layer.digests for layer in store.manifest.layers] == [
            layer.digests for layer in expected.manifest.layers
        ]


def test_a_folder_with_one_file_is_a_checkpoint_and_its_store_is_found_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path, _ = make_file(folder / "model.gguf", "qwen2moe", "Q4_0")
    store = prepare(str(folder), tmp_path / "store")
    assert store.manifest.model.source == str(folder)
    found: Callable[..., Any] = find_complete_store
    again = found(str(folder), tmp_path / "store", revision=None, dtype=None)
    assert again.manifest == store.manifest
    assert prepare(str(path), tmp_path / "store").manifest == store.manifest
