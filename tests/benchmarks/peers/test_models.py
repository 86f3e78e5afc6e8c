"""The benchmark's models, GGUF files and settings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.peers.faasmoe_server import FaasmoeServer, missing_spec_fields
from benchmarks.peers.gguf_files import gguf_path, quantize
from benchmarks.peers.models import GEOMETRIES, function_counts, make_model, vocabulary
from safetensors.torch import load_file
from transformers import AutoTokenizer

from faasmoe_operator.api.v1alpha1.router import RouterSpec


def test_models_have_the_published_sizes() -> None:
    demo, qwen = GEOMETRIES["demo"], GEOMETRIES["qwen"]
    assert (demo.layers, demo.hidden, demo.intermediate, demo.vocabulary) == (30, 576, 96, 49_152)
    assert (qwen.layers, qwen.hidden, qwen.experts, qwen.vocabulary) == (4, 2048, 60, 25_344)
    assert vocabulary("demo-checkpoint") == 49_152


def test_functions_are_divided_evenly() -> None:
    assert function_counts("qwen", functions_per_layer=3, sandboxes=3) == (20, 4)
    for name in ("demo", "demo-checkpoint"):
        assert function_counts(name, functions_per_layer=3, sandboxes=3) == (3, 30)
    assert function_counts("qwen", functions_per_layer=2, sandboxes=2) == (30, 4)


def test_checkpoint_has_zero_biases_and_a_tokenizer_with_merges(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "tiny")
    config = json.loads((folder / "config.json").read_text())
    assert config["qkv_bias"] is True
    assert config["tie_word_embeddings"] is False
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.self_attn.k_proj.bias" in index
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == vocabulary("tiny")
    assert len(tokenizer.encode("the")) == 2
    assert tokenizer.decode([300]) == "<300>"
    head = load_file(folder / index["lm_head.weight"])["lm_head.weight"].float()  # [V, H]
    is_silent = head.abs().sum(dim=1) == 0
    assert bool(is_silent[tokenizer.convert_tokens_to_ids("ð")])  # the first byte of an emoji
    assert 0 < int(is_silent.sum()) < 200
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == 1


@pytest.mark.parametrize(("quantization", "bits"), [("Q8_0", 8.5), ("Q4_0", 4.5)])
def test_quantize_keeps_vectors_and_metadata(
    tmp_path: Path, quantization: str, bits: float
) -> None:
    import gguf

    weight = np.random.default_rng(0).standard_normal((4, 64), np.float32)  # [N, K]
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(source, arch="qwen2moe")
    writer.add_string("general.name", "x")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("matrix", gguf.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("vector", np.ones(64, np.float32))
    head = np.random.default_rng(1).standard_normal((4, 512), np.float32)  # [N, K]
    writer.add_tensor("output.weight", gguf.quantize(head, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    quantize(source, target, quantization)

    reader = gguf.GGUFReader(target)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["matrix"].tensor_type.name == quantization
    assert tensors["matrix"].n_bytes == weight.size * bits / 8
    restored = gguf.dequantize(tensors["matrix"].data, tensors["matrix"].tensor_type)
    assert np.abs(restored - weight).max() < 0.5
    np.testing.assert_array_equal(tensors["vector"].data, np.ones(64, np.float32))
    head_kind = "Q6_K" if quantization == "Q4_0" else quantization  # as llama-quantize does
    assert tensors["output.weight"].tensor_type.name == head_kind
    restored = gguf.dequantize(tensors["output.weight"].data, tensors["output.weight"].tensor_type)
    assert np.abs(restored - head).max() < 0.1
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert (
        reader.fields["general.file_type"].contents()
        == gguf.LlamaFileType[f"MOSTLY_{quantization}"]
    )


def test_paths_tell_precisions_apart() -> None:
    names = {gguf_path(Path("/x/model"), p).name for p in ("bf16", "int8", "int4")}
    assert names == {"model-BF16.gguf", "model-Q8_0.gguf", "model-Q4_0-default.gguf"}


def test_only_quantized_precisions_ask_for_quantization() -> None:
    server = FaasmoeServer(Path("/x"), 8, functions_per_layer=3, sandboxes=3)
    experts, router = server.spec_fields("bf16")
    assert "quantization" not in experts | router
    experts, router = server.spec_fields("int8")
    assert experts["quantization"] == router["quantization"] == "int8"
    assert set(missing_spec_fields()) <= {"experts.quantization", "router.quantization"}


def test_the_engine_vllm_is_asked_for_where_its_environment_is_given() -> None:
    own = FaasmoeServer(Path("/x"), 8, functions_per_layer=3, sandboxes=3)
    assert "engine" not in own.spec_fields("bf16")[1]
    _, router = replace(own, vllm_python=Path("/v")).spec_fields("bf16")
    assert RouterSpec.model_validate(router).engine == "vllm"
    assert router["engineArgs"]["enforceEager"]
    compiled = replace(own, vllm_python=Path("/v"), vllm_is_compiled=True).spec_fields("bf16")[1]
    assert not compiled["engineArgs"]["enforceEager"]
