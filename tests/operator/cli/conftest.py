"""Fixtures: a minimal prepared store and a MoEModel file that refers to it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from faasmoe_contracts.store import (
    FileEntry,
    LayerEntry,
    Manifest,
    ModelEntry,
    sha256_of_file,
)

LAYERS = 2
EXPERTS = 8

WriteModel = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write model.yaml with the given spec lines and return its path."""

    def write(*spec: str, source: str = "file://checkpoint") -> Path:
        lines = [
            "apiVersion: faasmoe.dev/v1alpha1",
            "kind: MoEModel",
            "metadata: {name: tiny}",
            "spec:",
            f"  model: {{source: '{source}'}}",
            "  store: {path: store}",
            *(f"  {line}" for line in spec),
        ]
        file = tmp_path / "model.yaml"
        file.write_text("\n".join(lines))
        return file

    return write


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store whose manifest and file sizes are consistent; its files hold one byte each."""
    folder = tmp_path / "store"
    folder.mkdir()
    files = {}
    for index in range(LAYERS):
        name = f"layer{index}.safetensors"
        (folder / name).write_bytes(b"x")
        files[name] = FileEntry(1, sha256_of_file(folder / name))
    layers = [
        LayerEntry(
            index,
            f"l{index}",
            name,
            EXPERTS,
            2,
            4,
            "Experts",
            None,
            1 << 20,
            0,
            ("0" * 32,) * (EXPERTS + 1),
        )
        for index, name in enumerate(files)
    ]
    source = (tmp_path / "checkpoint").as_uri()
    model = ModelEntry(source, None, "tiny_moe", "TinyMoe", "bfloat16", 4, 10, 64, LAYERS)
    manifest = Manifest.create(model=model, layers=tuple(layers), files=files)
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return folder
