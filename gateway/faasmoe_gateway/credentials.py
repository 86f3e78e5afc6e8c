"""The keys that clients show, and which of them were valid lately."""

from __future__ import annotations

from collections import OrderedDict

from starlette.types import Scope

MAX_KNOWN_CREDENTIALS = 4096


def shown_key(scope: Scope) -> str:
    """Return the key that a request shows, valid or not; empty if it shows none."""
    scheme, _, key = header_value(scope, b"authorization").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else header_value(scope, b"x-api-key").strip()


def header_value(scope: Scope, name: bytes) -> str:
    """Return the first value of a header, named in lower case; empty if there is none."""
    value: bytes = next((v for n, v in scope["headers"] if n == name), b"")
    return value.decode("latin-1")


class KnownCredentials:
    """Keys that were valid lately. All others are of one sender, as anybody makes them up."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()

    def sender(self, key: str) -> str:
        """Return who sends with a key."""
        return key if key in self._known else ""

    def add(self, key: str) -> None:
        """Note that a key is valid."""
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN_CREDENTIALS:
            self._known.popitem(last=False)
