"""Which of a model's routers gets a request; only decides, no side effects.

Requests of one session, or with the same prefix, go to the same router, whose KV cache knows it:
consistent hashing with bounded loads (Mirrokni et al., 2018). A router that has more than
`LOAD_FACTOR` times the average is passed over for the next on the ring, and when routers come or
go, only their own requests move. Other requests go where the fewest tokens are outstanding.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Collection, Mapping

LOAD_FACTOR = 1.25
POINTS_PER_ROUTER = 100
PREFIX_BYTES = 1024


def affinity_key(tenant: str, *, session: str, prefix: bytes) -> bytes:
    """Return what requests that belong together have in common; empty if there is nothing.

    Args:
        tenant: whose request it is; different tenants share no cache.
        session: what the client calls its session; empty for none.
        prefix: the beginning of its prompt.
    """
    if not session and not prefix:
        return b""
    kind, value = (b"s", session.encode()) if session else (b"p", prefix[:PREFIX_BYTES])
    return b"\0".join((tenant.encode(), kind, value))


class HashRing:
    """The routers of one model on a ring.

    Args:
        routers: their names.
    """

    def __init__(self, routers: Collection[str]) -> None:
        self.routers = tuple(sorted(routers))
        points = ((_point(f"{r}/{n}".encode()), r) for r in routers for n in _POINTS)
        self._points = sorted(points)

    def walk(self, key: bytes) -> list[str]:
        """Return the routers in the order in which a key prefers them."""
        start = bisect.bisect(self._points, (_point(key), ""))
        following = self._points[start:] + self._points[:start]
        return list(dict.fromkeys(router for _, router in following))


def choose_router(ring: HashRing, loads: Mapping[str, float], key: bytes) -> str:
    """Return the router for a request.

    Args:
        ring: the routers that may be chosen; at least one.
        loads: outstanding tokens of each, without the request; 0 for those not named.
        key: what it shares with requests before it; empty for nothing.
    """
    by_load = min(ring.routers, key=lambda router: (loads.get(router, 0), router))
    if not key:
        return by_load
    average = sum(loads.get(router, 0) for router in ring.routers) / len(ring.routers)
    # The lightest has at most the average, so one is always within the bound.
    bound = max(LOAD_FACTOR * average, loads.get(by_load, 0))
    return next(router for router in ring.walk(key) if loads.get(router, 0) <= bound)


_POINTS = range(POINTS_PER_ROUTER)


def _point(value: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest())
