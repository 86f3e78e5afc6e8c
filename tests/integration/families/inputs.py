"""Seeded prompts for the tiny models."""

import torch
from torch import Tensor

FIRST_TOKEN = 3  # after the padding, begin and end tokens
LAST_TOKEN = 119  # last token of the smallest vocabulary without padding rows


def prompts(*, n_sequences: int = 2, n_tokens: int = 12, seed: int = 1) -> Tensor:
    """Return token ids `[B, S]`, longer than the sliding windows of the models."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_sequences, n_tokens)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, shape, generator=generator)  # [B, S]
