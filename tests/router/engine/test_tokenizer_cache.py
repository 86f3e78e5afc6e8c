"""Tokenizers that are shared by folders with equal files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.engine.tokenizer_cache import TokenizerCache, load_tokenizer


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    path = tmp_path / "first"
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text("{}")
    (path / "generation_config.json").write_text('{"temperature": 0.5}')
    return path


class Loads:
    """Counts loads.

    Attributes:
        folders: the folders that were loaded.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []

    def __call__(self, folder: Path) -> ModelTokenizer:
        self.folders.append(folder.name)
        return load_tokenizer(folder)


def test_folders_with_equal_files_share_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    loads = Loads()
    cache = TokenizerCache(loads)
    first = cache.get(folder)
    second = Path(shutil.copytree(folder, tmp_path / "second"))
    (second / "generation_config.json").write_text("{}")  # not of the tokenizer
    assert cache.get(second) is first
    assert loads.folders == ["first"]
    assert first.decode(first.encode("the quick")) == "the quick"


def test_folder_whose_files_change_gets_another_tokenizer(folder: Path) -> None:
    cache = TokenizerCache(Loads())
    first = cache.get(folder)
    assert cache.get(folder) is first
    (folder / "chat_template.jinja").write_text("other")
    second = cache.get(folder)
    assert second is not first
    assert second.tool_chat_template == "other"


def test_only_the_last_ones_are_kept(folder: Path, tmp_path: Path) -> None:
    loads = Loads()
    cache = TokenizerCache(loads, size=2)
    others = [Path(shutil.copytree(folder, tmp_path / name)) for name in ("b", "c")]
    for number, other in enumerate(others):
        (other / "chat_template.jinja").write_text(f"{number}")
    for path in (folder, others[0], folder, others[1], folder, others[0]):
        cache.get(path)
    assert loads.folders == ["first", "b", "c", "b"]


def test_broken_file_is_the_parsers_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(Exception, match=r"EOF|expected|Expecting"):
        TokenizerCache().get(folder)
