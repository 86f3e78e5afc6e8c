"""FaaSMoE's version and OpenAI's `system_fingerprint`."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def installed_version() -> str:
    """Return the installed version; "0+source" in a source tree without installation."""
    try:
        return version("faasmoe")
    except PackageNotFoundError:
        return "0+source"


FINGERPRINT_DIGITS = 12
FINGERPRINTED_PACKAGES = ("torch", "transformers")


def system_fingerprint(store_digest: str, model: Any) -> str:
    """Return an identifier of the weights and of the software and device that compute them.

    With equal fingerprints, the same request and seed can be expected to give the same output.

    Args:
        store_digest: digest of the store that holds the weights.
        model: the model; supplies dtype and device.
    """
    versions = [installed_version(), *map(version, FINGERPRINTED_PACKAGES)]
    parts = (store_digest, str(model.dtype), model.device.type, *versions)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"fp_{digest[:FINGERPRINT_DIGITS]}"
