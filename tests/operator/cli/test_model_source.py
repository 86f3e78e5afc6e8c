from pathlib import Path

import pytest

from faasmoe_operator.cli.model_source import ModelSource
from faasmoe_operator.errors import CommandError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a checkpoint, a GGUF file and what is neither."""
    (tmp_path / "org" / "My_Model v2").mkdir(parents=True)
    (tmp_path / "org" / "My_Model v2" / "config.json").write_text("{}")
    (tmp_path / "Tiny-Q8_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.yaml").write_text("")
    (tmp_path / "gguf").mkdir()
    for name in ("a", "B-00001-of-00002", "B-00002-of-00002", "B"):
        (tmp_path / "gguf" / f"{name}.gguf").write_bytes(b"GGUF")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "uri", "served_name", "name"),
    [
        ("Qwen/Qwen3-30B-A3B", "hf://Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("o/Q-GGUF:q4_k_m", "hf://o/Q-GGUF:q4_k_m", "o/Q-GGUF:q4_k_m", "q-gguf-q4-k-m"),
        ("o/Q:sub/Q-Q8_0.gguf", "hf://o/Q:sub/Q-Q8_0.gguf", "o/Q:sub/Q-Q8_0.gguf", "q-q8-0-gguf"),
        ("hf://org/Name_1.5", "hf://org/Name_1.5", "org/Name_1.5", "name-1-5"),
        ("org/My_Model v2", "file://{}/org/My_Model%20v2", "My_Model-v2", "my-model-v2"),
        ("./org/My_Model v2/", "file://{}/org/My_Model%20v2", "My_Model-v2", "my-model-v2"),
        (
            "file://{}/org/My_Model%20v2",
            "file://{}/org/My_Model%20v2",
            "My_Model-v2",
            "my-model-v2",
        ),
        ("Tiny-Q8_0.gguf", "file://{}/Tiny-Q8_0.gguf", "Tiny-Q8_0", "tiny-q8-0"),
        ("gguf", "file://{}/gguf", "gguf", "gguf"),
        ("gguf/B-00001-of-00002.gguf", "file://{}/gguf/B-00001-of-00002.gguf", "B", "b"),
        (f"o/{'n' * 80}", f"hf://o/{'n' * 80}", f"o/{'n' * 80}", "n" * 63),
        ("o/...", "hf://o/...", "o/...", "model"),
    ],
)
def test_source_and_names(text: str, uri: str, served_name: str, name: str, folder: Path) -> None:
    source = ModelSource.parse(text.format(folder))
    assert source.uri == uri.format(folder)
    assert (source.served_name, source.name) == (served_name, name)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("org/name", []),
        ("org/My_Model v2", ["config.json"]),
        ("Tiny-Q8_0.gguf", ["Tiny-Q8_0.gguf"]),
        ("gguf/a.gguf", ["a.gguf"]),
        ("gguf/B-00002-of-00002.gguf", ["B-00001-of-00002.gguf", "B-00002-of-00002.gguf"]),
    ],
)
def test_files_of_a_checkpoint(text: str, names: list[str]) -> None:
    assert [path.name for path in ModelSource.parse(text).files()] == names


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "name",
            "there is no {}/name; expected a folder, a GGUF file, or ORG/NAME or ORG/NAME:QUANT",
        ),
        ("./org/none", "there is no {}/org/none; expected"),
        ("/no/such/folder", "there is no /no/such/folder; expected"),
        ("org/none.gguf", "there is no {}/org/none.gguf; expected"),
        ("a/b/c", "there is no {}/a/b/c; expected"),
        ("hf://name", "expected hf://ORG/NAME"),
        ("", "expected a folder, a GGUF file, or ORG/NAME or ORG/NAME:QUANT on the hub"),
        ("model.yaml", "{}/model.yaml is a file, expected .*; a MoEModel file is given with -f"),
        ("org", "the folder {}/org has no config.json .*; there is one in {}/org/My_Model v2"),
        ("store", "{}/store is a store that `faasmoe prepare` wrote, expected its checkpoint"),
    ],
)
def test_what_cannot_be_served_is_named(text: str, problem: str, folder: Path) -> None:
    with pytest.raises(CommandError, match=problem.replace("{}", ".*")) as raised:
        ModelSource.parse(text)
    assert raised.value.exit_status == 2
    assert str(raised.value).startswith(f"MODEL: got {text!r}: ")
