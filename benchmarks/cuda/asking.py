"""Asking a process that has torch: it prints what it found as JSON, last."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from benchmarks.sides import ROOT


class NoAnswer(RuntimeError):
    """The process ended without an answer, and has said why; `status` is its own."""

    def __init__(self, module: str, status: int) -> None:
        super().__init__(f"{module} ended with status {status}")
        self.status = status


async def ask(module: str, *arguments: str) -> dict[str, Any]:
    """Return what a module prints last; raises NoAnswer."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise NoAnswer(module, process.returncode)
    return dict(json.loads(output.splitlines()[-1]))
