"""Tiny checkpoints, quantised as their publishers' tools write them.

Each comes with a reference: the same checkpoint with the weights dequantised by the writer, in
plain floats, so that a reader is compared with code that it does not share.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families.entries import ENTRIES
from families.registry import _config_class, _model_class
from families.shrink import shrink
from families.weights import SEED, randomize_constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

Parts = dict[str, Tensor]
Write = Callable[[str, Tensor], tuple[Parts, Tensor] | None]
"""Of a tensor's name and values: the tensors that are published in its place, by name, and the
values that they stand for; None if it is published as it is."""

SIZES = {"hidden_size": 64, "moe_intermediate_size": 96, "intermediate_size": 96}
_NOT_QUANTISED = ("embed", "head.weight", "norm", ".gate.", "expert_gate", "router", "kv_a_proj")


@dataclass(frozen=True)
class Published:
    """A quantised checkpoint and its reference.

    Attributes:
        folder: the quantised checkpoint.
        reference: the same weights in plain floats.
    """

    folder: Path
    reference: Path


def build(family: str, **sizes: Any) -> PreTrainedModel:
    """Build a family's random model in float32 with weights of ordinary size."""
    entry = ENTRIES[family]
    model_class = _model_class(family, entry)
    config_class = _config_class(model_class)
    known = {n: v for n, v in (SIZES | sizes).items() if n in config_class.__dataclass_fields__}
    config = shrink(config_class, {**entry.overrides, **known})
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = model_class(config)
    randomize_constants(model)
    return model.eval()


def publish(
    model: PreTrainedModel,
    folder: Path,
    write: Write,
    quantization_config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Published:
    """Save a model quantised, and its reference, in two folders below `folder`."""
    reference, published = folder / "reference", folder / "published"
    model.to(dtype).save_pretrained(reference)
    (reference / "generation_config.json").unlink(missing_ok=True)
    codes: Parts = {}
    values: Parts = {}
    for name, tensor in load_file(reference / "model.safetensors").items():
        written = write(name, tensor.float())
        if written is None:
            codes[name] = values[name] = tensor
        else:
            codes |= {n: t.contiguous() for n, t in written[0].items()}
            values[name] = written[1].to(dtype).contiguous()
    save(values, reference)
    published.mkdir()
    save(codes, published)
    config = json.loads((reference / "config.json").read_text())
    config["quantization_config"] = dict(quantization_config)
    (published / "config.json").write_text(json.dumps(config))
    return Published(published, reference)


def save(tensors: Parts, folder: Path) -> None:
    """Save the only weight file of a checkpoint."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    """Replace a tensor of a checkpoint, or remove it."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save(tensors if tensor is None else tensors | {name: tensor}, folder)


def linears(write: Callable[[str, Tensor], tuple[Parts, Tensor]]) -> Write:
    """Apply a writer to the weights of linear layers, with the name of the layer, but to gates."""

    def write_linear(name: str, weight: Tensor) -> tuple[Parts, Tensor] | None:
        if weight.dim() != 2 or not name.endswith(".weight"):
            return None
        if any(part in name for part in _NOT_QUANTISED):
            return None
        return write(name.removesuffix(".weight"), weight)

    return write_linear
