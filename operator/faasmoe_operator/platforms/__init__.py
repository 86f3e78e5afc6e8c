"""Platforms that run sandboxes, behind one interface: create, delete, list and watch.

Holds the interface alone, so that the command line runs without an HTTP client.
"""

from faasmoe_operator.platforms.base import (
    Platform,
    ProcessSandboxTemplate,
    Sandbox,
    SandboxEvent,
    SandboxTemplate,
)

__all__ = [
    "Platform",
    "ProcessSandboxTemplate",
    "Sandbox",
    "SandboxEvent",
    "SandboxTemplate",
]
