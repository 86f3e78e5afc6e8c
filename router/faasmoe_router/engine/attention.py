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

HALF = (torch.bfloat16, torch.float16)

Installed = tuple[tuple[str, Callable[[], bool]], ...]
FLASH: Installed = (
    ("flash_attention_3", is_flash_attn_3_available),
    ("flash_attention_2", is_flash_attn_2_available),
)


def use_batchable_attention(model: Any, *, flash: Installed = FLASH) -> None:
    """Give the model the best attention that continuous batching can run it with here.

    Args:
        model: the router's model.
        flash: the names of flash attention, the best first, and whether each can be used.
    """
    current = model.config._attn_implementation
    if "flash" in str(current) or current == "paged|eager":
        return
    wanted = _flash(model, flash) or ("sdpa" if model._supports_sdpa else "paged|eager")
    if current != wanted:
        model.set_attn_implementation(wanted)


def _flash(model: Any, flash: Installed) -> str | None:
    if model.device.type != "cuda" or model.dtype not in HALF or not model._supports_flash_attn:
        return None
    return next((name for name, is_available in flash if is_available()), None)
