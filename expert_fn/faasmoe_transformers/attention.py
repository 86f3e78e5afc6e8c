"""Selects the attention implementation that continuous batching runs with.

On a CUDA device that is flash attention if it is installed: it needs no masks and reads the paged
cache in place. Nothing is downloaded, unlike with transformers' own `auto_switch_to_flash`, which
may fetch kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

HALF_PRECISION_DTYPES = (torch.bfloat16, torch.float16)

AttentionCandidates = tuple[tuple[str, Callable[[], bool]], ...]
FLASH_ATTENTION_CANDIDATES: AttentionCandidates = (
    ("flash_attention_3", is_flash_attn_3_available),
    ("flash_attention_2", is_flash_attn_2_available),
)


def select_attention_implementation(
    model: Any, *, flash_candidates: AttentionCandidates = FLASH_ATTENTION_CANDIDATES
) -> None:
    """Set the best attention implementation with which continuous batching can run the model.

    An implementation that is already suitable, flash attention or `paged|eager`, is kept.

    Args:
        model: a transformers model.
        flash_candidates: names of flash attention implementations, best first, each with a
            predicate that tells whether it is installed.
    """
    current = model.config._attn_implementation
    if "flash" in str(current) or current == "paged|eager":
        return
    selected = _best_flash_attention(model, flash_candidates) or (
        "sdpa" if model._supports_sdpa else "paged|eager"
    )
    if current != selected:
        model.set_attn_implementation(selected)


def count_attention_masks(text_config: Any) -> int:
    """Return how many masks a batch needs: one per kind of attention, none with flash attention.

    Args:
        text_config: the model's text config, with the attention implementation selected.
    """
    if "flash" in str(text_config._attn_implementation):
        return 0
    return len(set(getattr(text_config, "layer_types", None) or ["full_attention"]))


def _best_flash_attention(model: Any, flash_candidates: AttentionCandidates) -> str | None:
    if (
        model.device.type != "cuda"
        or model.dtype not in HALF_PRECISION_DTYPES
        or not model._supports_flash_attn
    ):
        return None
    return next((name for name, is_available in flash_candidates if is_available()), None)
