"""Whether this machine has the devices that a MoEModel asks for: asked before anything is started.

The control plane has no torch, so a process that has it is asked, and only if cuda is asked for.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from typing import Any

from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.errors import CommandError
from faasmoe_operator.spec import MoEModelError

COMMAND = (sys.executable, "-m", "faasmoe_expert.device")
TIMEOUT_S = 60.0
CUDA = "cuda"


async def check_devices(deployment: Deployment, *, command: Sequence[str] = COMMAND) -> None:
    """Raise MoEModelError if cuda is asked for and this machine has none.

    Args:
        deployment: what is to be served.
        command: says as JSON what devices there are.
    """
    spec = deployment.model.spec
    devices = {"spec.router.device": spec.router.device, "spec.experts.device": spec.experts.device}
    fields = [field for field, device in devices.items() if device == CUDA]
    if not fields:
        return
    found = await _ask(command)
    if found["n_devices"] == 0:
        expected = f"cpu or auto on this machine: {found['why_none']}"
        problems = [f"{field}: got {CUDA}, expected {expected}" for field in fields]
        raise MoEModelError(str(deployment.file), problems)


async def _ask(command: Sequence[str]) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise CommandError(f"{command[-1]} said nothing for {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return dict(json.loads(output))
    except ValueError:
        raise CommandError(f"{command[-1]} ended with status {process.returncode}") from None
