"""FaaSMoE's own version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Return the version that is installed."""
    try:
        return version("faasmoe")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
