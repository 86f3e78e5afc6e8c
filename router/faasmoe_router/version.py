"""FaaSMoE's own version.

`system_fingerprint`: equal where the same request and seed may be expected to repeat.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def installed_version() -> str:
    """Return the version that is installed."""
    try:
        return version("faasmoe")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


FINGERPRINT_DIGITS = 12
FINGERPRINTED_PACKAGES = ("torch", "transformers")


def system_fingerprint(store_digest: str, model: Any) -> str:
    """Return what tells these weights, and what they are computed with, from all others.

    Args:
        store_digest: of the store that the weights are read from.
        model: the model, for its numbers' format and its device.
    """
    versions = [installed_version(), *map(version, FINGERPRINTED_PACKAGES)]
    parts = (store_digest, str(model.dtype), model.device.type, *versions)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"fp_{digest[:FINGERPRINT_DIGITS]}"
