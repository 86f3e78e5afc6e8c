"""What of a response does not follow from its request and its tokens: random ids, seed and time.

All of it follows from an `Origin`, so that a stream that goes on in another process keeps its ids
and its draws.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastapi import Request

SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the ids, the seed and the time of one response come from.

    Attributes:
        nonce: a secret random text.
        created_s: time of the response in seconds since the epoch.
    """

    nonce: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    created_s: int = field(default_factory=lambda: int(time.time()))

    def hex_id(self, *names: str | int) -> str:
        """Return 32 hexadecimal digits, the same for the same names."""
        return hashlib.blake2b(self._key(names), digest_size=16).hexdigest()

    def characters(self, alphabet: str, length: int, *names: str | int) -> str:
        """Return a text of some characters, the same for the same names."""
        digest = hashlib.shake_256(self._key(names)).digest(2 * length)
        values = (int.from_bytes(digest[i : i + 2]) for i in range(0, len(digest), 2))
        return "".join(alphabet[value % len(alphabet)] for value in values)

    def hex_ids(self, name: str) -> Iterator[str]:
        """Yield ids without end, the same for the same name."""
        number = 0
        while True:
            yield self.hex_id(name, number)
            number += 1

    @property
    def seed(self) -> int:
        """The seed of a request that sets none."""
        return int(self.hex_id("seed"), 16) >> (128 - SEED_BITS)

    def _key(self, names: tuple[str | int, ...]) -> bytes:
        return "/".join((self.nonce, *map(str, names))).encode()


def get_origin(request: Request) -> Origin:
    """Return the origin of a request's response; the same for each call."""
    origin = getattr(request.state, "origin", None)
    if origin is None:
        origin = request.state.origin = Origin()
    assert isinstance(origin, Origin)
    return origin
