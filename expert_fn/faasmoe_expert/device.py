"""Resolves device names (auto, cpu, cuda, cuda:N) and detects lost CUDA devices.

`python -m faasmoe_expert.device` prints as JSON how many CUDA devices torch finds, and why there
are none. The launcher runs it before starting anything, because it does not import torch itself.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import torch

from faasmoe_expert.config import SandboxConfigError

CUDA_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # NVIDIA driver, WSL

logger = logging.getLogger(__name__)


def resolve_device(name: str, *, field: str = "FAASMOE_DEVICE") -> torch.device:
    """Return the torch device for `name` (auto, cpu, cuda or cuda:N).

    Initializes a CUDA device, so that an unusable one is reported at startup and the first call
    does not wait for it. `auto` falls back to the CPU. A device with an index becomes the thread's
    current device; otherwise pinned memory would create a context, which takes memory, on device 0.

    Args:
        name: the device name.
        field: setting to name in error messages.

    Raises:
        SandboxConfigError: the CUDA device does not exist or is unusable.
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
        raise SandboxConfigError(f"{field}: got {name!r}, which is unusable: {failure}")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def cuda_unavailable_reason() -> str | None:
    """Return why torch finds no CUDA device and what to do about it; None if it finds one."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return (
            f"torch {torch.__version__} is built without CUDA; install its CUDA build, or use the "
            "image built with DEVICE=cuda"
        )
    if torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return (
        f"torch finds no CUDA device{hidden}; check that `nvidia-smi` lists one and that the "
        "container has access to it"
    )


def is_cuda_possible() -> bool:
    """Return whether `auto` may resolve to a CUDA device, without initializing CUDA.

    For processes that fork: an initialized CUDA context does not survive a fork.
    """
    is_built: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    return is_built and any(node.exists() for node in CUDA_NODES)


def device_lost_reason(device: torch.device) -> str | None:
    """Return why a device that was in use is unusable now; None if it works.

    Most CUDA errors corrupt the process's context: every later call fails too, and only a new
    process can use the device.
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
    """Initialize a device; return the first line of the error if that fails, else None."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def main() -> int:
    """Print the number of CUDA devices and why there are none as JSON; return 0."""
    why_none = cuda_unavailable_reason()
    count = 0 if why_none else torch.cuda.device_count()
    print(json.dumps({"n_devices": count, "why_none": why_none}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
