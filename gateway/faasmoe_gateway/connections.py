"""Which connections of clients are kept when there are too many; only decides, no side effects.

Whoever has shown a key is known. When the places run out, connections of unknown clients that are
not being answered go first, the oldest before the others, then idle ones of known clients. So
nobody without a key can keep a paying tenant, or a probe, from being served.
"""

from __future__ import annotations

import resource
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

MAX_CONNECTIONS = 4096
MAX_CONNECTIONS_PER_ADDRESS = 1024
KNOWN_CLIENT_EXTENSION = "faasmoe.known_client"  # of the ASGI scope: marks who has shown a key
RESERVED_DESCRIPTORS = 512  # for sandboxes, the store and the control plane


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections are kept, and for how long.

    Attributes:
        max_connections: open connections.
        max_per_address: open connections of one client address; those of a Unix socket have none.
        keep_alive_s: how long an unused connection is kept after a response.
        head_timeout_s: time to send a head, from the connection's start or the head's first byte.
        body_timeout_s: time to send a body.
        write_timeout_s: time in which a client must read something of what it is sent.
    """

    max_connections: int = MAX_CONNECTIONS
    max_per_address: int = MAX_CONNECTIONS_PER_ADDRESS
    keep_alive_s: float = 75.0  # longer than the pools of load balancers, which keep 60 s
    head_timeout_s: float = 20.0
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0


def descriptor_limited(max_connections: int) -> int:
    """Return how many connections this process's descriptors allow; raises its soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return max_connections
    return max(1, min(max_connections, soft - min(RESERVED_DESCRIPTORS, soft // 2)))


class ConnectionTable:
    """The open connections, by how readily each may be closed.

    Args:
        limits: how many there may be.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._addresses: dict[Hashable, str] = {}
        self._n_by_address: Counter[str] = Counter()
        # By age, and by last use: those that may be closed for others.
        self._unknown: OrderedDict[Hashable, None] = OrderedDict()
        self._idle: OrderedDict[Hashable, None] = OrderedDict()
        self._known: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._addresses)

    def admit(self, connection: Hashable, address: str) -> tuple[bool, Hashable | None]:
        """Add a connection; return whether there is a place, and the connection to close for it.

        A connection without a place is not added.
        """
        victim: Hashable | None = None
        if address and self._n_by_address[address] >= self._limits.max_per_address:
            victim = self._find_victim(address)
        elif len(self) >= self._limits.max_connections:
            victim = self._find_victim(None)
        else:
            self._add(connection, address)
            return True, None
        if victim is None:
            return False, None
        self.remove(victim)
        self._add(connection, address)
        return True, victim

    def set_known(self, connection: Hashable) -> None:
        """Record that a connection's client has shown a key."""
        if connection in self._addresses:
            self._known.add(connection)
            self._unknown.pop(connection, None)

    def set_busy(self, connection: Hashable, *, is_busy: bool) -> None:
        """Record whether a request of a connection is being answered."""
        if connection not in self._addresses:
            return
        places = self._idle if connection in self._known else self._unknown
        if is_busy:
            self._idle.pop(connection, None)
            self._unknown.pop(connection, None)
        else:
            places[connection] = None

    def remove(self, connection: Hashable) -> None:
        """Remove a closed connection; ignores unknown ones."""
        address = self._addresses.pop(connection, None)
        if address is None:
            return
        self._n_by_address[address] -= 1
        if not self._n_by_address[address]:
            del self._n_by_address[address]
        self._known.discard(connection)
        self._unknown.pop(connection, None)
        self._idle.pop(connection, None)

    def _add(self, connection: Hashable, address: str) -> None:
        self._addresses[connection] = address
        self._n_by_address[address] += 1
        self._unknown[connection] = None

    def _find_victim(self, address: str | None) -> Hashable | None:
        for places in (self._unknown, self._idle):
            for connection in places:
                if address is None or self._addresses[connection] == address:
                    return connection
        return None
