"""One frame's tensors to a device and back: through pinned memory, waited for once, at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def ship(host: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on `device`, perhaps still on its way; nothing to do on the CPU."""
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def land(tensor: Tensor) -> Tensor:
    """Return a device's tensor on the host, contiguous, once it is computed."""
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
