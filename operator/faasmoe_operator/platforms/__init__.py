"""Where sandboxes run: four verbs (create, delete, list, watch), one module for each platform."""

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
