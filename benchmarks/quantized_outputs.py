"""The demo model's outputs with quantised weights, beside those of the float32 model.

Weights are read from stores that `prepare` quantised and are dequantised to float32, which is what
the kernels compute with, so that nothing but quantisation differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.worker import ROOT
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from faasmoe_contracts.store import QuantizationEntry, Store, TensorQuantization
from faasmoe_contracts.store.quantization import SCALE_SUFFIX, relative_error
from faasmoe_expert.functions.dequantization import dequantize
from faasmoe_router.checkpoint.demo import make_demo_model
from faasmoe_router.checkpoint.prepare import prepare

PASSAGES = ("docs/design.md", "docs/tenants.md", "docs/faults.md", "CONTRIBUTING.md")
ROUTER_SCHEMES = {"int8": ("none", "int8"), "int4": ("none", "int4"), "mxfp4": ("none", "int8")}


def measure_outputs(schemes: Sequence[str], *, folder: Path, n_tokens: int) -> list[dict[str, Any]]:
    """Return the figures of bf16 arithmetic, then of each scheme's experts, and router.

    Args:
        schemes: schemes of the experts; "none" is left out.
        folder: keeps the demo model and its stores.
        n_tokens: tokens of each passage.
    """
    checkpoint = folder / "demo-model"
    make_demo_model(checkpoint)
    tokens = _passages(checkpoint, n_tokens)  # [B, S]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = _logits(model, tokens)  # [B, S, V]
    figures = [{"weights": "bf16 arithmetic", "router": "", "relative_error": 0.0}]
    figures[0] |= _compare(_logits(model.bfloat16(), tokens), expected)
    model.float()
    for scheme in schemes:
        for router in ROUTER_SCHEMES.get(scheme, ()):
            model.load_state_dict(original)
            store = _store(checkpoint, folder, QuantizationEntry(scheme, router))
            entries = [entry for name, entry, weight in _assign(model, store)]
            figures.append(
                {"weights": scheme, "router": router, "relative_error": relative_error(entries)}
                | _compare(_logits(model, tokens), expected)
            )
    return figures


def _passages(checkpoint: Path, n_tokens: int) -> Tensor:
    """Return the first tokens of each passage, [B, S]."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in PASSAGES]
    return torch.tensor([tokenizer(text)["input_ids"][:n_tokens] for text in texts])


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits.float()


def _compare(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the share of equal most likely tokens, and the mean KL(expected || logits)."""
    reference = expected.log_softmax(-1)
    divergence = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)  # [B, S]
    agreement = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    return {"top1_agreement": agreement.item(), "kl": divergence.mean().item()}


def _store(checkpoint: Path, folder: Path, quantization: QuantizationEntry) -> Store:
    name = f"demo-store-{quantization.experts}-{quantization.router}"
    return prepare(str(checkpoint), folder / name, quantization=quantization, force=True)


def _assign(model: Any, store: Store) -> list[tuple[str, TensorQuantization, Tensor]]:
    """Replace the model's quantised weights by the store's; return them by name."""
    assigned = list(_dequantised(store))
    with torch.no_grad():
        for name, _, weight in assigned:
            model.get_parameter(name).copy_(weight)
    return assigned


def _dequantised(store: Store) -> Iterator[tuple[str, TensorQuantization, Tensor]]:
    for layer in store.manifest.layers:
        tensors = load_file(store.path / layer.file)
        entries = {f"{layer.name}.{name}": entry for name, entry in layer.quantization.items()}
        named = {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}
        yield from _of_file(named, entries)
    router = {f"{name}.weight": entry for name, entry in store.manifest.router.quantized.items()}
    for path in store.router_files():
        yield from _of_file(load_file(path), router)


def _of_file(
    tensors: Mapping[str, Tensor], entries: Mapping[str, TensorQuantization]
) -> Iterator[tuple[str, TensorQuantization, Tensor]]:
    for name, entry in entries.items():
        if name in tensors:
            weight = dequantize(tensors[name], tensors[name + SCALE_SUFFIX], entry)
            yield name, entry, weight
