"""API keys: read from folders, kept as SHA-256 digests only, compared in constant time.

A folder is a mounted Secret, or one like it: each file that does not begin with a dot is a key,
less its last line end. A kubelet swaps the files of a Secret all at once, through the link
`..data`. Nothing of a key is ever in a message, a log line or a repr.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from faasmoe_router.errors import RouterError

MAX_KEY_BYTES = 8 << 10  # more than a header may carry
MAX_KEYS = 100  # of a tenant: each is compared with at every request
MAX_READ_ATTEMPTS = 3  # at reading a folder whose files are swapped meanwhile


class KeyReadError(RouterError):
    """A folder of keys that cannot be used; the message names the file and tells nothing of it."""


def key_digest(key: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_key_digests(folder: Path) -> frozenset[bytes]:
    """Return the digests of a folder's keys; a folder that is not there has none.

    Raises:
        KeysUnreadable: a file cannot be read, or holds no key.
    """
    for _ in range(MAX_READ_ATTEMPTS - 1):
        try:
            return _read_folder(folder)
        except FileNotFoundError:
            continue  # swapped between the listing and the reading
    try:
        return _read_folder(folder)
    except FileNotFoundError as error:
        raise KeyReadError(f"{error.filename}: listed, but not there") from None


def _read_folder(folder: Path) -> frozenset[bytes]:
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise KeyReadError(f"{folder}: {error.strerror}") from None
    if len(paths) > MAX_KEYS:
        raise KeyReadError(f"{folder}: got {len(paths)} keys, expected at most {MAX_KEYS}")
    return frozenset(_digest_of_file(path) for path in paths)


def _digest_of_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_BYTES + 2)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeyReadError(f"{path}: {error.strerror}") from None
    key = content.removesuffix(b"\n").removesuffix(b"\r")
    if not key:
        raise KeyReadError(f"{path}: got no key, expected one")
    if len(key) > MAX_KEY_BYTES:
        raise KeyReadError(f"{path}: got a longer key, expected at most {MAX_KEY_BYTES} bytes")
    return hashlib.sha256(key).digest()


class KeyRing:
    """All tenants' keys; never changes, but is replaced as a whole.

    Args:
        digests: each tenant's. A key that two tenants have is nobody's.
    """

    def __init__(self, digests: Mapping[str, frozenset[bytes]]) -> None:
        owners = Counter(digest for keys in digests.values() for digest in keys)
        self._entries = tuple(
            (digest, tenant)
            for tenant, keys in digests.items()
            for digest in sorted(keys)
            if owners[digest] == 1
        )
        self.n_keys = {tenant: sum(t == tenant for _, t in self._entries) for tenant in digests}
        self.n_shared_keys = sum(count > 1 for count in owners.values())

    def __repr__(self) -> str:
        return f"KeyRing({len(self._entries)} keys)"

    def find_tenant(self, key: str) -> str | None:
        """Return whose key this is; takes as long whichever matches, or none."""
        presented = key_digest(key)
        tenant_found = None
        for digest, tenant in self._entries:
            if hmac.compare_digest(digest, presented):
                tenant_found = tenant
        return tenant_found
