"""`system_fingerprint`: equal where the same request and seed may be expected to repeat."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

from faasmoe_router.version import installed_version

SHOWN_DIGITS = 12
COMPUTED_WITH = ("torch", "transformers")


def fingerprint(store_digest: str, model: Any) -> str:
    """Return what tells these weights, and what they are computed with, from all others.

    Args:
        store_digest: of the store that the weights are read from.
        model: the model, for its numbers' format and its device.
    """
    versions = [installed_version(), *map(version, COMPUTED_WITH)]
    parts = (store_digest, str(model.dtype), model.device.type, *versions)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"fp_{digest[:SHOWN_DIGITS]}"
