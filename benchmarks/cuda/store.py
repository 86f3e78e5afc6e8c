"""Generates a store with many layers from a store with one, in seconds.

`python -m benchmarks.cuda.store FOLDER '{"layers": 24, …}'` writes it and prints its path. All
layers have the same weights and share one file through hard links. Timing does not depend on the
values, each layer is still copied to the device separately, and the page cache holds one layer
instead of 24. The manifest is that of an ordinary store, digests included.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.geometry import CheckpointGeometry, make_model

from faasmoe_contracts.store import FileEntry, LayerEntry, Manifest, Store, sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor

FIRST_LAYER_PREFIX = "model.layers.0."
SHALLOW_DIR = "shallow"
ROUTER_FILE = "router/model.safetensors"
CONFIG_FILE = "model/config.json"


def make_deep_store(geometry: CheckpointGeometry, folder: Path) -> Path:
    """Return the folder of a store with this geometry; generate it unless it exists."""
    path = folder / f"{geometry.name}-deep-store"
    if (path / "manifest.json").exists():
        return path
    _, shallow = make_model(replace(geometry, layers=1), folder / SHALLOW_DIR)
    _write_deep_store(Store.open(shallow), geometry.layers, path)
    return path


def _write_deep_store(shallow: Store, n_layers: int, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    layers = tuple(_layers(shallow.manifest.layers[0], n_layers))
    for name in shallow.manifest.files:
        if name.startswith("model/") and name != CONFIG_FILE:
            _link(shallow.path / name, path / name)
    for layer in layers:
        _link(shallow.path / shallow.manifest.layers[0].file, path / layer.file)
    _write_config(shallow, n_layers, path / CONFIG_FILE)
    _write_router(shallow, n_layers, path / ROUTER_FILE)
    _link_tokenizer(shallow.path / "model", path / "model")
    model = replace(shallow.manifest.model, num_hidden_layers=n_layers)
    files = _files(shallow, path, {layer.file for layer in layers})
    manifest = Manifest.create(model=model, layers=layers, files=files)
    (path / "manifest.json").write_text(json.dumps(manifest.to_json()), encoding="utf-8")


def _layers(first: LayerEntry, n_layers: int) -> Iterator[LayerEntry]:
    for index in range(n_layers):
        name = first.name.replace(FIRST_LAYER_PREFIX, f"model.layers.{index}.")
        yield replace(first, index=index, name=name, file=f"experts/{index:05}.safetensors")


def _write_config(shallow: Store, n_layers: int, path: Path) -> None:
    config: dict[str, Any] = json.loads((shallow.path / CONFIG_FILE).read_text(encoding="utf-8"))
    config["num_hidden_layers"] = n_layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:1] * n_layers
    path.write_text(json.dumps(config), encoding="utf-8")


def _write_router(shallow: Store, n_layers: int, path: Path) -> None:
    """Write the router's weights, repeating those of the first layer for every layer."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = {}
    for file in shallow.router_files():
        for name, tensor in load_file(file).items():
            if not name.startswith(FIRST_LAYER_PREFIX):
                tensors[name] = tensor
                continue
            for index in range(n_layers):
                tensors[name.replace(FIRST_LAYER_PREFIX, f"model.layers.{index}.")] = tensor.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def _link_tokenizer(shallow: Path, deep: Path) -> None:
    """Link files that are not part of the store itself, such as the benchmark's tokenizer."""
    for file in shallow.iterdir():
        if not (deep / file.name).exists():
            _link(file, deep / file.name)


def _files(shallow: Store, path: Path, layer_files: set[str]) -> dict[str, FileEntry]:
    """Return the manifest entries of all files; linked files keep their checksums."""
    layer_entry = shallow.manifest.files[shallow.manifest.layers[0].file]
    files = dict.fromkeys(layer_files, layer_entry)
    for name, entry in shallow.manifest.files.items():
        if name.startswith("model/") and name != CONFIG_FILE:
            files[name] = entry
    for name in (CONFIG_FILE, ROUTER_FILE):
        files[name] = FileEntry((path / name).stat().st_size, sha256_of_file(path / name))
    return files


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


def main() -> int:
    """Generate the store; print its folder and geometry as JSON."""
    folder, geometry = Path(sys.argv[1]), CheckpointGeometry(**json.loads(sys.argv[2]))
    print(json.dumps({"store": str(make_deep_store(geometry, folder)), **asdict(geometry)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
