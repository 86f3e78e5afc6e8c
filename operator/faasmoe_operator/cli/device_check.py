"""Whether this machine has the devices that a MoEModel requests."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from typing import Any

from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import CommandError

PROBE_COMMAND = (sys.executable, "-m", "faasmoe_expert.device")
PROBE_TIMEOUT_S = 60.0
CUDA = "cuda"


async def check_devices(deployment: LocalModel, *, command: Sequence[str] = PROBE_COMMAND) -> None:
    """Check that this machine has the devices that the model requests.

    This process does not import torch, so a child process probes the devices, and only if the
    model requests cuda.

    Args:
        deployment: the model to serve.
        command: prints the devices as a JSON object with `n_devices` and `why_none`.

    Raises:
        MoEModelError: cuda is requested but not available.
        CommandError: the probe failed.
    """
    spec = deployment.model.spec
    devices = {"spec.router.device": spec.router.device, "spec.experts.device": spec.experts.device}
    fields = [field for field, device in devices.items() if device == CUDA]
    if not fields:
        return
    probe = await _probe_devices(command)
    if probe["n_devices"] == 0:
        expected = f"cpu or auto on this machine: {probe['why_none']}"
        raise deployment.error(*(f"{field}: got {CUDA}, expected {expected}" for field in fields))


async def _probe_devices(command: Sequence[str]) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE)
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise CommandError(f"{command[-1]} did not respond within {PROBE_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return dict(json.loads(output))
    except ValueError:
        raise CommandError(f"{command[-1]} ended with status {process.returncode}") from None
