"""TLS over one of the transport's sockets: what `Connection` uses of a socket, never blocking.

OpenSSL sees memory instead of the socket (an `ssl.SSLObject`), because the TCP connection is not
yet established when the first bytes are handed over, and because the parts of a frame become one
write: `ssl.SSLSocket` has no scatter-gather send. What is encrypted counts as sent; `has_unsent`
tells whether some of it still waits for the socket.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

from faasmoe_contracts.tls import TlsPeer

SEND_BYTES = 256 << 10
"""Most bytes that are encrypted before the socket must have taken them."""
RECEIVE_BYTES = 256 << 10


class TlsSocket:
    """A client's end of a connection; its handshake runs as data is sent and received.

    Args:
        tcp: a non-blocking socket, which may still be connecting.
        peer: certificate to show, and name that the server must have.

    Attributes:
        is_secure: whether the handshake is complete: the server is who it should be.
    """

    def __init__(self, tcp: socket.socket, peer: TlsPeer) -> None:
        self.is_secure = False
        self._tcp = tcp
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = peer.context().wrap_bio(
            self._incoming, self._outgoing, server_hostname=peer.name
        )
        self._encrypted = memoryview(b"")  # taken from `_outgoing`, and not by the socket

    def fileno(self) -> int:
        """Return the file descriptor, for `poll`."""
        return self._tcp.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether encrypted bytes wait for the socket."""
        return bool(self._encrypted) or bool(self._outgoing.pending)

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """Encrypt some bytes; return their number.

        Raises:
            BlockingIOError: none can be taken now.
            OSError: the connection or the server's certificate failed.
        """
        self._shake_hands()
        self.flush()
        n_taken = self._tls.write(_join(parts, SEND_BYTES))
        with suppress(BlockingIOError):  # `has_unsent` tells
            self.flush()
        return n_taken

    def flush(self) -> None:
        """Send what is encrypted; raises BlockingIOError if the socket does not take all of it."""
        while self.has_unsent:
            if not self._encrypted:
                self._encrypted = memoryview(self._outgoing.read())
            self._encrypted = self._encrypted[self._tcp.send(self._encrypted) :]

    def recv_into(self, view: memoryview) -> int:
        """Decrypt received bytes into memory; return their number, 0 if the server has ended.

        Raises:
            BlockingIOError: there are none now.
            OSError: the connection or the server's certificate failed.
        """
        self._shake_hands()
        while True:
            try:
                return self._tls.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                if not self._receive():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0

    def close(self) -> None:
        """Close the socket."""
        self._tcp.close()

    def _shake_hands(self) -> None:
        while not self.is_secure:
            try:
                self._tls.do_handshake()
                self.is_secure = True
            except ssl.SSLWantReadError:
                self.flush()
                if not self._receive():
                    raise ConnectionResetError("the server has closed it instead of TLS") from None
            except ssl.SSLError:
                with suppress(OSError):
                    self.flush()  # what tells the server why
                raise

    def _receive(self) -> bool:
        """Take what the socket has; return False at its end; raises BlockingIOError, OSError."""
        data = self._tcp.recv(RECEIVE_BYTES)
        self._incoming.write(data)
        return bool(data)


def _join(parts: Sequence[memoryview], max_bytes: int) -> bytes:
    """Return the first bytes of all parts together."""
    taken: list[memoryview] = []
    for part in parts:
        taken.append(part[:max_bytes])
        max_bytes -= len(taken[-1])
        if not max_bytes:
            break
    return b"".join(taken)
