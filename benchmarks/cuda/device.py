"""`python -m benchmarks.cuda.device cuda|cpu`: prints a description of the device as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from faasmoe_expert.config import SandboxConfigError
from faasmoe_expert.device import resolve_device


def describe_device(name: str) -> dict[str, Any]:
    """Return name, memory and versions of a device.

    Raises:
        SandboxConfigError: the device does not exist.
    """
    device = resolve_device(name, field="--device")
    if device.type == "cpu":
        return {"name": "cpu", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def main() -> int:
    """Print the device as JSON."""
    try:
        print(json.dumps(describe_device(sys.argv[1])))
    except SandboxConfigError as error:
        print(f"benchmarks.cuda: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
