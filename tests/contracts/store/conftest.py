"""A tiny handwritten store: two MoE layers of three experts and one router file."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def safetensors_bytes(tensors: Tensors) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    return struct.pack("<Q", len(text)) + text + data


def manifest_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    entries = {
        name: {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    layers = [name for name in sorted(files) if name.startswith("experts/")]
    value = {
        "format": "faasmoe-store",
        "version": 2,
        "model": {
            "source": "org/name",
            "revision": None,
            "family": "mixtral",
            "architecture": "MixtralForCausalLM",
            "dtype": "float32",
            "hidden_size": 4,
            "vocab_size": 8,
            "max_position_embeddings": 16,
            "num_hidden_layers": 2,
        },
        "layers": [
            {
                "index": index,
                "name": f"model.layers.{index}.mlp.experts",
                "file": name,
                "num_experts": 3,
                "top_k": 2,
                "hidden_size": 4,
                "class": "MixtralExperts",
                "kernel": {"name": "gated", "activation": "silu"},
                "expert_bytes": 48,
                "shared_bytes": 8,
                "digests": [f"{index}{block}" * 16 for block in range(4)],
            }
            for index, name in enumerate(layers)
        ],
        "files": entries,
    }
    return {**value, "digest": digest_of(value)}


def digest_of(value: Mapping[str, Any]) -> str:
    """Compute the digest by definition: SHA-256 of compact ASCII JSON with sorted keys."""
    rest = {name: field for name, field in value.items() if name != "digest"}
    text = json.dumps(rest, separators=(",", ":"), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode('ascii')).hexdigest()}"


def layer_tensors(first: int) -> Tensors:
    return {
        "down_proj": ("F32", (3, 4, 2), struct.pack("<24f", *range(first, first + 24))),
        "gate_up_proj": ("BF16", (3, 4, 2), bytes(range(48))),
        "norm.weight": ("F32", (2,), struct.pack("<2f", 0.5, 2.0)),
    }


@pytest.fixture
def files() -> dict[str, bytes]:
    return {
        "experts/00000.safetensors": safetensors_bytes(layer_tensors(0)),
        "experts/00001.safetensors": safetensors_bytes(layer_tensors(100)),
        "router/model-00001-of-00001.safetensors": safetensors_bytes(
            {"embed.weight": ("F32", (2,), bytes(8))}
        ),
        "model/config.json": b"{}",
    }


@pytest.fixture
def manifest(files: dict[str, bytes]) -> dict[str, Any]:
    return manifest_of(files)


@pytest.fixture
def store_path(tmp_path: Path, files: dict[str, bytes], manifest: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "store"
