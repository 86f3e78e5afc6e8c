"""Which of transformers' attention implementations continuous batching runs with.

On a CUDA device flash attention, if it is installed: it needs no masks, and reads the paged cache
in place. Nothing is fetched: transformers' own switch may download kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
)

HALF_PRECISION_DTYPES = (torch.bfloat16, torch.float16)

AttentionCandidates = tuple[tuple[str, Callable[[], bool]], ...]
FLASH_ATTENTION_CANDIDATES: AttentionCandidates = (
    ("flash_attention_3", is_flash_attn_3_available),
    ("flash_attention_2", is_flash_attn_2_available),
)


def select_attention_implementation(
    model: Any, *, flash_candidates: AttentionCandidates = FLASH_ATTENTION_CANDIDATES
) -> None:
    """Give the model the best attention that continuous batching can run it with here.

    Args:
        model: the router's model.
        flash: the names of flash attention, the best first, and whether each can be used.
    """
    current = model.config._attn_implementation
    if "flash" in str(current) or current == "paged|eager":
        return
    selected = _best_flash_attention(model, flash_candidates) or (
        "sdpa" if model._supports_sdpa else "paged|eager"
    )
    if current != selected:
        model.set_attn_implementation(selected)


def _best_flash_attention(model: Any, flash_candidates: AttentionCandidates) -> str | None:
    if (
        model.device.type != "cuda"
        or model.dtype not in HALF_PRECISION_DTYPES
        or not model._supports_flash_attn
    ):
        return None
    return next((name for name, is_available in flash_candidates if is_available()), None)
