"""Who the tenants are now: the tenants file and the folders of keys, read again as they change.

What cannot be read leaves the last good state of that part in force: a damaged file must not lock
everybody out. Keys that are gone are revoked at the next reading.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from faasmoe_router.errors import ConfigError
from faasmoe_router.tenants.document import Tenant, TenantsDocument
from faasmoe_router.tenants.errors import DocumentError
from faasmoe_router.tenants.keys import KeyRing, KeysUnreadable, read_keys

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 1.0
_KEPT = "what was read last stays in force"


class Directory:
    """The tenants and their keys.

    Args:
        path: the tenants file.
        interval_s: how long what was read is taken for true.

    Raises:
        ConfigError: the tenants file cannot be used; later ones that cannot are passed over.
    """

    def __init__(self, path: Path, *, interval_s: float = REFRESH_INTERVAL_S) -> None:
        self._path = path
        self.interval_s = interval_s
        self._read_at_s = float("-inf")
        self._troubles: Mapping[str, str] = {}
        self._digests: dict[str, frozenset[bytes]] = {}
        try:
            self.document = TenantsDocument.loads(path.read_bytes())
        except (DocumentError, OSError) as error:
            raise ConfigError(f"FAASMOE_TENANTS_FILE: {path}: {error}") from error
        self._tenants = {tenant.name: tenant for tenant in self.document.tenants}
        self.ring = KeyRing({})
        troubles: dict[str, str] = {}
        self._read_keys(troubles)
        self._tell(troubles)

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """The tenants by name."""
        return self._tenants

    def identify(self, key: str) -> Tenant | None:
        """Return whose key this is, in a time that does not depend on it."""
        return self._tenants.get(self.ring.owner_of(key) or "")

    def refresh(self, now_s: float) -> bool:
        """Read everything again if that is due; return whether the tenants file changed."""
        if now_s - self._read_at_s < self.interval_s:
            return False
        self._read_at_s = now_s
        troubles: dict[str, str] = {}
        before, self.document = self.document, self._read_document(troubles)
        self._tenants = {tenant.name: tenant for tenant in self.document.tenants}
        self._read_keys(troubles)
        self._tell(troubles)
        return before != self.document

    def _read_document(self, troubles: dict[str, str]) -> TenantsDocument:
        try:
            return TenantsDocument.loads(self._path.read_bytes())
        except DocumentError as error:
            troubles[str(self._path)] = f"{error}; {_KEPT}"
        except OSError as error:
            troubles[str(self._path)] = f"{error.strerror}; {_KEPT}"
        return self.document

    def _read_keys(self, troubles: dict[str, str]) -> None:
        digests = {}
        for tenant in self.document.tenants:
            try:
                digests[tenant.name] = read_keys(tenant.keys_folder)
            except KeysUnreadable as error:
                digests[tenant.name] = self._digests.get(tenant.name, frozenset())
                troubles[tenant.name] = f"{error}; {_KEPT}"
        if digests != self._digests:
            self._digests = digests
            self.ring = KeyRing(digests)
        if self.ring.n_ambiguous:
            troubles["keys"] = f"{self.ring.n_ambiguous} are several tenants': they open nothing"

    def _tell(self, troubles: Mapping[str, str]) -> None:
        """Log what is wrong, once."""
        for where, what in troubles.items():
            if self._troubles.get(where) != what:
                logger.error("Tenants: %s: %s", where, what)
        self._troubles = troubles
