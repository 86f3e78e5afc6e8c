"""Seeded prompts for the tiny models."""

import torch
from torch import Tensor

FIRST_TOKEN = 3  # after padding, begin and end
LAST_TOKEN = 119  # the smallest vocabulary without its padding rows


def prompts(*, n_sequences: int = 2, n_tokens: int = 12, seed: int = 1) -> Tensor:
    """Returns token ids `[B, S]`, longer than the models' sliding windows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_sequences, n_tokens)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, shape, generator=generator)  # [B, S]
