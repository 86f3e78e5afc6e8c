"""API keys: read from folders, stored as SHA-256 digests only, compared in constant time.

A folder is a mounted Secret or looks like one: each file whose name does not start with a dot is a
key, without its last line break. The kubelet replaces all files of a Secret atomically, through the
link `..data`. No message, log line or repr contains any part of a key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

MAX_KEY_BYTES = 8 << 10  # longer than a header may be
MAX_KEYS = 100  # of one tenant: every request is compared with each of them
MAX_READ_ATTEMPTS = 3  # of reading a folder while its files are replaced


class KeyReadError(Exception):
    """An invalid folder of keys; the message names the file but not its content."""


def key_digest(key: str) -> bytes:
    """Return the SHA-256 digest of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_key_digests(folder: Path) -> frozenset[bytes]:
    """Return the digests of a folder's keys; raises as `read_named_digests` does."""
    return frozenset(read_named_digests(folder).values())


def read_named_digests(folder: Path) -> dict[str, bytes]:
    """Return the digests of a folder's keys by file name; none if the folder does not exist.

    Raises:
        KeyReadError: a file cannot be read, or is no key.
    """
    for _ in range(MAX_READ_ATTEMPTS - 1):
        try:
            return _read_folder(folder)
        except FileNotFoundError:
            continue  # replaced between listing and reading
    try:
        return _read_folder(folder)
    except FileNotFoundError as error:
        raise KeyReadError(f"{error.filename}: listed, but does not exist") from None


def _read_folder(folder: Path) -> dict[str, bytes]:
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise KeyReadError(f"{folder}: {error.strerror}") from None
    if len(paths) > MAX_KEYS:
        raise KeyReadError(f"{folder}: got {len(paths)} keys, expected at most {MAX_KEYS}")
    return {path.name: _digest_of_file(path) for path in paths}


def _digest_of_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_BYTES + 2)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeyReadError(f"{path}: {error.strerror}") from None
    return content_digest(content, where=str(path))


def content_digest(content: bytes, *, where: str) -> bytes:
    """Return the digest of the key in a file, or in an entry of a Secret.

    Args:
        content: the key, maybe with a line break after it.
        where: the file or entry, for the message.

    Raises:
        KeyReadError: there is no key, or one that is too long.
    """
    key = content.removesuffix(b"\n").removesuffix(b"\r")
    if not key:
        raise KeyReadError(f"{where}: got no key, expected one")
    if len(key) > MAX_KEY_BYTES:
        raise KeyReadError(f"{where}: got a longer key, expected at most {MAX_KEY_BYTES} bytes")
    return hashlib.sha256(key).digest()


class KeyRing:
    """Immutable set of all tenants' keys.

    Args:
        digests: key digests by tenant; a key that several tenants have authenticates none of them.

    Attributes:
        n_keys: number of valid keys by tenant.
        n_shared_keys: number of keys that several tenants have.
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
        """Return the tenant of a key, None for an unknown one, in constant time."""
        presented = key_digest(key)
        tenant_found = None
        for digest, tenant in self._entries:
            if hmac.compare_digest(digest, presented):
                tenant_found = tenant
        return tenant_found
