"""Platforms that run sandboxes, behind one interface: create, delete, list and watch."""

from faasmoe_operator.platforms.base import (
    Platform,
    ProcessSandboxTemplate,
    Sandbox,
    SandboxEvent,
    SandboxTemplate,
)
from faasmoe_operator.platforms.process import ProcessPlatform

__all__ = [
    "Platform",
    "ProcessPlatform",
    "ProcessSandboxTemplate",
    "Sandbox",
    "SandboxEvent",
    "SandboxTemplate",
]
