"""FaaSMoE's version and OpenAI's `system_fingerprint`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@cache
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
    return system_fingerprint_of(
        store_digest, str(model.dtype), model.device.type, FINGERPRINTED_PACKAGES
    )


def system_fingerprint_of(
    store_digest: str, dtype: str, device: str, packages: Iterable[str]
) -> str:
    """Return the fingerprint of weights that these packages compute; see `system_fingerprint`.

    Args:
        store_digest: digest of the store that holds the weights.
        dtype: dtype of the computation.
        device: kind of the device.
        packages: the packages; their versions count, and those that are not installed do not.
    """
    versions = [installed_version(), *filter(None, map(_version_of, packages))]
    digest = hashlib.sha256("\n".join((store_digest, dtype, device, *versions)).encode())
    return f"fp_{digest.hexdigest()[:FINGERPRINT_DIGITS]}"


@cache
def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
