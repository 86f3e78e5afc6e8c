import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.store.references import StoreMode
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import PrepareError
from faasmoe_transformers import weight_conversion

MakeCheckpoint = Callable[..., Path]
TinyModel = Callable[..., Any]
StoredTensors = Callable[[Store], dict[str, torch.Tensor]]
AssertHoldsModel = Callable[[Store, Path, torch.dtype], None]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_every_tensor_equals_from_pretrained(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    family: str,
    max_shard_size: str,
    assert_holds_model: AssertHoldsModel,
) -> None:
    checkpoint = make_checkpoint(family, max_shard_size=max_shard_size)
    assert (checkpoint / "model.safetensors").exists() == (max_shard_size == "5GB")
    store = prepare(str(checkpoint), tmp_path / "store")
    assert_holds_model(store, checkpoint, torch.float32)
    Store.open(tmp_path / "store").verify()


def test_a_store_that_is_prepared_again_leaves_files_in_use_as_they_are(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Sandboxes and routers may have mapped them."""
    folder = tmp_path / "store"
    prepare(str(make_checkpoint("mixtral")), folder, dtype="float16", mode=StoreMode.COPY)
    before = {path: path.open("rb") for path in folder.rglob("*") if path.is_file()}
    contents = {path: path.read_bytes() for path in before}
    prepare(
        str(make_checkpoint("mixtral")), folder, dtype="bfloat16", mode=StoreMode.COPY, force=True
    )
    experts = [path for path in before if path.parent.name == "experts"]
    assert experts
    assert all(path.read_bytes() != contents[path] for path in experts)
    for path, opened in before.items():
        with opened:
            assert opened.read() == contents[path]


def test_source_checkpoint_has_one_tensor_per_expert(make_checkpoint: MakeCheckpoint) -> None:
    names = load_file(make_checkpoint("mixtral") / "model.safetensors").keys()
    assert sum(".experts." in name for name in names) == 2 * 4 * 3


def test_slice_size_does_not_change_the_store(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("mixtral")
    store = prepare(str(checkpoint), tmp_path / "store")
    monkeypatch.setattr(weight_conversion, "SLICE_BYTES", 1)
    assert prepare(str(checkpoint), tmp_path / "rows").manifest.digest == store.manifest.digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_equals_from_pretrained(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    dtype: str,
    assert_holds_model: AssertHoldsModel,
) -> None:
    checkpoint = make_checkpoint("deepseek_v3")
    store = prepare(str(checkpoint), tmp_path / "store", dtype=dtype)
    assert_holds_model(store, checkpoint, getattr(torch, dtype))
    assert store.manifest.model.dtype == dtype
    assert AutoConfig.from_pretrained(store.path / "model").dtype == getattr(torch, dtype)


def test_manifest_describes_the_model(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("deepseek_v3", dtype=torch.bfloat16)
    manifest = prepare(str(checkpoint), tmp_path / "store").manifest
    model = manifest.model
    assert (model.family, model.architecture) == ("deepseek_v3", "DeepseekV3ForCausalLM")
    assert (model.source, model.revision, model.dtype) == (str(checkpoint), None, "bfloat16")
    assert (model.hidden_size, model.vocab_size, model.num_hidden_layers) == (32, 96, 2)
    (layer,) = manifest.layers
    assert (layer.index, layer.name) == (0, "model.layers.1.mlp.experts")
    assert (layer.num_experts, layer.top_k, layer.hidden_size) == (8, 2, 32)
    assert (layer.expert_bytes, layer.shared_bytes) == (3 * 24 * 32 * 2, 0)
    assert layer.kernel == {
        "name": "gated",
        "activation": "silu",
        "transposed": False,
        "interleaved": False,
        "bias": False,
    }


def test_layer_is_mapped_according_to_the_manifest(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, tiny_model: TinyModel
) -> None:
    store = prepare(str(make_checkpoint("gpt_oss")), tmp_path / "store")
    mapped = store.map_layer(1).tensors
    assert sorted(mapped) == ["down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"]
    expected = tiny_model("gpt_oss").model.layers[1].mlp.experts.down_proj.detach()  # [E, I, H]
    view = mapped["down_proj"]
    assert torch.equal(
        torch.frombuffer(view.buffer, dtype=torch.float32).view(view.shape), expected
    )


def test_tied_weights_are_stored_once(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, stored_tensors: StoredTensors
) -> None:
    store = prepare(str(make_checkpoint("qwen2_moe")), tmp_path / "store")
    names = set(stored_tensors(store))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_differ_are_both_stored(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, equal: bool, stored_tensors: StoredTensors
) -> None:
    checkpoint = make_checkpoint("qwen2_moe")
    tensors = load_file(checkpoint / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if equal else head + 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    got = stored_tensors(prepare(str(checkpoint), tmp_path / "store"))
    assert ("lm_head.weight" in got) == (not equal)
    if not equal:
        assert torch.equal(got["lm_head.weight"], head + 1)


def test_tied_weight_under_its_alias_is_stored_under_the_canonical_name(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, assert_holds_model: AssertHoldsModel
) -> None:
    checkpoint = make_checkpoint("qwen2_moe")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    store = prepare(str(checkpoint), tmp_path / "store")
    assert_holds_model(store, checkpoint, torch.float32)


def test_unexpected_tensors_are_skipped_with_a_warning(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    stored_tensors: StoredTensors,
) -> None:
    checkpoint = make_checkpoint()
    tensors = load_file(checkpoint / "model.safetensors")
    extra = {f"mtp.{i}.weight": torch.zeros(3) for i in range(4)}
    save_file(tensors | extra, checkpoint / "model.safetensors")
    store = prepare(str(checkpoint), tmp_path / "store")
    assert "holds 4 tensors that Qwen2MoeForCausalLM has no parameter for" in caplog.text
    assert not any(name.startswith("mtp") for name in stored_tensors(store))


def _drop_parameter(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.q_proj.weight"]


def _drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]


def _drop_all_experts(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.0.mlp.experts" in name]:
        del tensors[name]


def _change_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            _drop_parameter,
            r"no tensor for model\.layers\.1\.self_attn\.q_proj\.weight",
            id="parameter",
        ),
        pytest.param(_drop_expert, r"layers\.1\.mlp\.experts\.gate_up_proj: ", id="expert"),
        pytest.param(
            _drop_all_experts, r"layers\.0\.mlp\.experts\.down_proj, .*gate_up", id="all-experts"
        ),
        pytest.param(_change_shape, r"norm\.weight: got shape \[5\], expected \[32\]", id="shape"),
    ],
)
def test_missing_or_misshapen_parameters_are_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, change: Any, message: str
) -> None:
    checkpoint = make_checkpoint()
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(PrepareError, match=message):
        prepare(str(checkpoint), tmp_path / "store")
    with pytest.raises(StoreError, match=r"manifest\.json: not found"):
        Store.open(tmp_path / "store")


def test_dense_model_is_rejected(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"'llama' \(class LlamaForCausalLM\).*ExpertsInterface"):
        prepare(str(make_checkpoint("llama")), tmp_path / "store")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config: got quant_method 'fp8'",
            id="quantized",
        ),
        pytest.param({"architectures": ["NoSuchModel"]}, "got 'NoSuchModel'", id="class"),
        pytest.param({"architectures": ["AutoModel"]}, "got 'AutoModel'", id="no-model"),
        pytest.param({"model_type": "nosuch"}, "rejected by transformers", id="family"),
        pytest.param({"dtype": "float64"}, "dtype: got torch.float64", id="dtype"),
        pytest.param({"dtype": "float8"}, "rejected by transformers", id="no-dtype"),
        pytest.param(
            {"quantization_config": "nosuch"}, "got quant_method 'nosuch'", id="quantized-text"
        ),
        pytest.param({"architectures": "Qwen2MoeForCausalLM"}, "a list of class names", id="text"),
        pytest.param({"architectures": [5]}, "a list of class names", id="number-as-class"),
        pytest.param({"architectures": ["LlamaForCausalLM"]}, "cannot be built", id="other-class"),
        pytest.param({"hidden_act": "nosuch"}, "cannot be built.*nosuch", id="activation"),
        pytest.param({"hidden_size": -32}, "cannot be built.*-32", id="negative-size"),
        pytest.param(
            {"hidden_size": "x"}, "rejected by transformers.*hidden_size", id="text-as-size"
        ),
        pytest.param({"num_attention_heads": 0}, "Qwen2MoeForCausalLM cannot", id="no-heads"),
        pytest.param({"num_experts_per_tok": 7}, "got 7 experts per token.*at most 6", id="top-k"),
        pytest.param({"max_position_embeddings": 0}, "none of max_position", id="no-context"),
    ],
)
def test_unsupported_config_is_rejected(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = make_checkpoint() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(PrepareError, match=f"(?s){message}"):
        prepare(str(path.parent), tmp_path / "store")
    assert {file.name for file in (tmp_path / "store").glob("*")} <= {".lock"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_without_quantization_config_are_rejected(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = make_checkpoint()
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, checkpoint / "model.safetensors")
    with pytest.raises(PrepareError, match=f"{name}: got dtype .*8.*, expected one of BF16"):
        prepare(str(checkpoint), tmp_path / "store")


def test_two_tensors_for_one_parameter_are_rejected(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(PrepareError, match=r"model\.norm\.weight: got tensors .*, expected one"):
        prepare(str(checkpoint), tmp_path / "store")


def test_unknown_dtype_is_rejected(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="dtype: got 'int4', expected one of bfloat16"):
        prepare(str(make_checkpoint()), tmp_path / "store", dtype="int4")


def test_insufficient_disk_space_is_detected_before_writing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    with pytest.raises(PrepareError, match="got 1000 bytes free"):
        prepare(str(make_checkpoint()), tmp_path / "store")
    assert not (tmp_path / "store" / "experts").exists()


def test_auxiliary_files_are_copied_and_other_weights_are_not(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(max_shard_size="20KB")
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    store = prepare(str(checkpoint), tmp_path / "store")
    names = sorted(path.name for path in (store.path / "model").iterdir())
    assert names == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]
    original = (checkpoint / "config.json").read_bytes()
    assert (store.path / "model" / "config.json").read_bytes() == original
