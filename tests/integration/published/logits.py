"""Logits of published checkpoints: through functions, and as transformers loads them."""

from pathlib import Path

import torch
import transformers
from families.inputs import prompts
from families.registry import FAMILIES, Family, forward_logits
from published.checkpoints import Published
from test_golden import TOLERANCE, Sandboxes, logits_through_functions
from torch import Tensor

from faasmoe_contracts.store import Store
from faasmoe_contracts.store.references import StoreMode
from faasmoe_contracts.wire import OutputMode
from faasmoe_router.checkpoint.prepare import prepare


def family_named(name: str) -> Family:
    """Return a family by its name."""
    return next(family for family in FAMILIES if family.name == name)


def served_logits(
    checkpoint: Published,
    family: Family,
    sandboxes: Sandboxes,
    *,
    mode: StoreMode = StoreMode.COPY,
) -> tuple[Store, Tensor]:
    """Prepare a checkpoint; return its store and its logits [B, S, V] through functions."""
    store = prepare(str(checkpoint.folder), checkpoint.folder.parent / "store", mode=mode)
    logits = logits_through_functions(
        family, store, sandboxes, block=3, mode=OutputMode.REDUCED, dtype=torch.float32
    )
    return store, logits


def loaded_logits(
    folder: Path, family: Family, store: Store, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the logits [B, S, V] of a checkpoint as `from_pretrained` loads it in `dtype`.

    They are computed in float32.
    """
    model_class = getattr(transformers, store.manifest.model.architecture)
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    model = model if dtype is torch.float32 else model.float()
    model.set_experts_implementation("eager")
    return forward_logits(family, model, prompts())


def kept_schemes(store: Store) -> set[str]:
    """Return the schemes of the experts' codes."""
    return {e.scheme for layer in store.manifest.layers for e in layer.quantization.values()}


def assert_equal_logits(got: Tensor, expected: Tensor) -> None:
    """Assert that logits are equal but for the kernels' arithmetic.

    Twice the tolerance of floats: native kernels round activations to 16 bits in every layer. These
    models are wider than the registry's and their logits larger.
    """
    assert (got - expected).abs().max() <= 2 * TOLERANCE * expected.abs().max().clamp(min=1)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
