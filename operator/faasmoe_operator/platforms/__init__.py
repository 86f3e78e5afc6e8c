"""Where sandboxes run: four verbs (create, delete, list, watch), one module for each platform."""

from faasmoe_operator.platforms.base import (
    Platform,
    Sandbox,
    SandboxEvent,
    SandboxTemplate,
    Template,
)
from faasmoe_operator.platforms.process import ProcessPlatform

__all__ = [
    "Platform",
    "ProcessPlatform",
    "Sandbox",
    "SandboxEvent",
    "SandboxTemplate",
    "Template",
]
