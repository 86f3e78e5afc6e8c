"""Where a process computes: what auto, cpu, cuda and cuda:N mean on this machine.

`python -m faasmoe_expert.device` says as JSON how many CUDA devices torch finds here, and why none:
the launcher asks it before it starts anything, as it has no torch of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import torch

from faasmoe_expert.config import SandboxConfigError

CUDA_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # of the driver, of Windows' Linux

logger = logging.getLogger(__name__)


def resolve_device(name: str, *, field: str = "FAASMOE_DEVICE") -> torch.device:
    """Return the torch device that `name` (auto, cpu, cuda, cuda:N) means on this machine.

    A CUDA device is begun to be used here, so that one that cannot be used is told at the start,
    and no first call waits for it. auto takes the CPU if it cannot. One with an index becomes this
    thread's, so that pinned memory takes no context, and none of its memory, on another one.

    Raises:
        ConfigError: it asks for a CUDA device that is not there or cannot be used.
    """
    if name == "cpu":
        return torch.device("cpu")
    unavailable_reason = cuda_unavailable_reason()
    if name == "auto":
        return torch.device("cpu") if unavailable_reason else _cuda_or_cpu()
    if unavailable_reason:
        raise SandboxConfigError(
            f"{field}: got {name!r}, expected cpu or auto: {unavailable_reason}"
        )
    device, count = torch.device(name), torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise SandboxConfigError(f"{field}: got {name!r}, expected an index below {count}")
    if failure := _device_failure(device):
        raise SandboxConfigError(f"{field}: got {name!r}, which cannot be used: {failure}")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def cuda_unavailable_reason() -> str | None:
    """Return why torch finds no CUDA device, and what to do; None if it finds one."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return (
            f"torch {torch.__version__} is built without CUDA; install its CUDA build, or take the "
            "image that is built with DEVICE=cuda"
        )
    if torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return (
        f"torch finds no CUDA device{hidden}; `nvidia-smi` must list one here, and a container "
        "must be given it"
    )


def is_cuda_possible() -> bool:
    """Tell whether `auto` may come to be a CUDA device here, without touching CUDA.

    For a process that is to fork: CUDA that was begun does not survive a fork.
    """
    is_built: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    return is_built and any(node.exists() for node in CUDA_NODES)


def device_lost_reason(device: torch.device) -> str | None:
    """Return why a device that was in use cannot be used any more; None if it can.

    Most errors of CUDA end the process's context for good: whatever follows fails too, and only a
    new process can go on.
    """
    if device.type == "cpu":
        return None
    try:
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _cuda_or_cpu() -> torch.device:
    device = torch.device("cuda")
    if failure := _device_failure(device):
        logger.warning("device auto: falling back to CPU, %s is unusable: %s", device, failure)
        return torch.device("cpu")
    return device


def _device_failure(device: torch.device) -> str | None:
    """Return why a device cannot be used; None if it can, and is in use from now on."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def main() -> int:
    """Print what torch finds here."""
    why_none = cuda_unavailable_reason()
    count = 0 if why_none else torch.cuda.device_count()
    print(json.dumps({"n_devices": count, "why_none": why_none}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
