"""The tenants' accounts across restarts of the operator, and of routers: a ConfigMap of the model.

One that is damaged is kept in the same ConfigMap, for somebody to look at.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from faasmoe_operator.control.ledger import Ledger
from faasmoe_operator.control.ledger_record import DAMAGED, decode, encode
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.cache import ObjectCache, controller_uid
from faasmoe_operator.kube.errors import ApiError
from faasmoe_operator.kube.kinds import CONFIG_MAP
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.names import Component, accounts_name
from faasmoe_operator.kube.manifests.objects import new_object

logger = logging.getLogger(__name__)

FIELD = "accounts.json"
DAMAGED_FIELD = "accounts.damaged"
MAX_CHARS = 480 << 10  # twice, with a damaged one, they are within a ConfigMap's MiB


class LedgerMap:
    """Reads and writes the ledger of one model.

    Args:
        api: the Kubernetes API.
        cache: what it has told.
        ctx: the model.
        clock: the time of day.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        ctx: ModelContext,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._cache = cache
        self._ctx = ctx
        self._clock = clock
        self._damaged = ""

    def read(self) -> Ledger:
        """Return the ledger, a new one if there is none to use."""
        name = accounts_name(self._ctx.name)
        found = self._cache.get(CONFIG_MAP, self._ctx.namespace, name)
        data = (found.get("data") or {}) if found is not None else {}
        if found is None or controller_uid(found) != self._ctx.uid or FIELD not in data:
            return Ledger(self._clock())
        self._damaged = data.get(DAMAGED_FIELD, "")
        try:
            return decode(data[FIELD])
        except DAMAGED as error:
            logger.error("ConfigMap %s: accounts cannot be read and begin anew: %s", name, error)
            self._damaged = data[FIELD][:MAX_CHARS]
            return Ledger(self._clock())

    async def write(self, ledger: Ledger) -> bool:
        """Write the ledger in place of the last one; return whether that went well."""
        name = accounts_name(self._ctx.name)
        data = {FIELD: encode(ledger, max_chars=MAX_CHARS)}
        if self._damaged:
            data[DAMAGED_FIELD] = self._damaged
        wanted = new_object(self._ctx, CONFIG_MAP, name, component=Component.CONTROL, data=data)
        try:
            await self._api.apply(CONFIG_MAP, wanted)
        except ApiError as error:
            logger.error("ConfigMap %s: the tenants' accounts cannot be kept: %s", name, error)
            return False
        return True
