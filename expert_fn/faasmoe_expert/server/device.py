"""Where experts compute."""

from __future__ import annotations

import torch

from faasmoe_expert.config import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the torch device that `name` (auto, cpu, cuda, cuda:N) means on this machine.

    Raises ConfigError if it asks for CUDA and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"FAASMOE_DEVICE: got {name!r}, but this machine has no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"FAASMOE_DEVICE: got {name!r}, expected an index below {torch.cuda.device_count()}"
        )
    return device
