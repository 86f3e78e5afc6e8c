"""The tenants' accounts across restarts of the operator, and of routers: a ConfigMap of the model.

One that is damaged is kept in the same ConfigMap, for somebody to look at.

Popularity across restarts of the operator: one small ConfigMap for each model.

One that is missing, damaged or of another model is as good as none, and one that cannot be written
costs a log line.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.function_stats import (
    POPULARITY_DECODE_ERRORS,
    decode_popularity,
    encode_popularity,
)
from faasmoe_operator.control.usage_ledger import (
    LEDGER_DECODE_ERRORS,
    UsageLedger,
    decode_ledger,
    encode_ledger,
)
from faasmoe_operator.kube.cache import ObjectCache, controller_uid
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.context import new_object
from faasmoe_operator.kube.manifests.names import (
    Component,
    popularity_config_map_name,
    usage_config_map_name,
)
from faasmoe_operator.kube.types import CONFIG_MAP, Object

logger = logging.getLogger(__name__)


USAGE_KEY = "accounts.json"
CORRUPTED_USAGE_KEY = "accounts.damaged"
MAX_USAGE_CHARS = 480 << 10  # twice, with a damaged one, they are within a ConfigMap's MiB


class UsageConfigMap:
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
        self._corrupted = ""

    def read(self) -> UsageLedger:
        """Return the ledger, a new one if there is none to use."""
        name = usage_config_map_name(self._ctx.name)
        config_map = self._cache.get(CONFIG_MAP, self._ctx.namespace, name)
        data = (config_map.get("data") or {}) if config_map is not None else {}
        if (
            config_map is None
            or controller_uid(config_map) != self._ctx.uid
            or USAGE_KEY not in data
        ):
            return UsageLedger(self._clock())
        self._corrupted = data.get(CORRUPTED_USAGE_KEY, "")
        try:
            return decode_ledger(data[USAGE_KEY])
        except LEDGER_DECODE_ERRORS as error:
            logger.error("ConfigMap %s: usage is corrupted, starting from zero: %s", name, error)
            self._corrupted = data[USAGE_KEY][:MAX_USAGE_CHARS]
            return UsageLedger(self._clock())

    async def write(self, ledger: UsageLedger) -> bool:
        """Write the ledger in place of the last one; return whether that went well."""
        name = usage_config_map_name(self._ctx.name)
        data = {USAGE_KEY: encode_ledger(ledger, max_chars=MAX_USAGE_CHARS)}
        if self._corrupted:
            data[CORRUPTED_USAGE_KEY] = self._corrupted
        desired = new_object(self._ctx, CONFIG_MAP, name, component=Component.CONTROL, data=data)
        try:
            await self._api.apply(CONFIG_MAP, desired)
        except KubeApiError as error:
            logger.error("ConfigMap %s: usage not saved: %s", name, error)
            return False
        return True


POPULARITY_KEY = "popularity.json"
MAX_POPULARITY_CHARS = 512 << 10
FINAL_WRITE_TIMEOUT_S = 2.0


class PopularityConfigMap:
    """Reads and writes the counts of one model.

    Args:
        api: the Kubernetes API.
        cache: what it has told.
        ctx: the model.
        model_digest: counts of another store are not taken.
        clock: the time of day, as runs are compared by it.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        ctx: ModelContext,
        *,
        model_digest: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._cache = cache
        self._ctx = ctx
        self._digest = model_digest
        self._clock = clock

    def read(self) -> dict[str, float]:
        """Return the counts as they are now, nothing if there are none to use."""
        config_map = self._cache.get(
            CONFIG_MAP, self._ctx.namespace, popularity_config_map_name(self._ctx.name)
        )
        if config_map is None or controller_uid(config_map) != self._ctx.uid:
            return {}
        text = (config_map.get("data") or {}).get(POPULARITY_KEY, "")
        try:
            return decode_popularity(text, model_digest=self._digest, now_s=self._clock())
        except POPULARITY_DECODE_ERRORS as error:
            logger.warning(
                "ConfigMap %s: popularity ignored: %s",
                popularity_config_map_name(self._ctx.name),
                type(error).__name__,
            )
            return {}

    async def write(self, rows: Mapping[str, float]) -> bool:
        """Write the counts in place of the last ones; return whether that went well."""
        text = encode_popularity(
            _most_popular(rows), model_digest=self._digest, now_s=self._clock()
        )
        try:
            await self._api.apply(CONFIG_MAP, self._config_map(text))
        except KubeApiError as error:
            name = popularity_config_map_name(self._ctx.name)
            logger.warning("ConfigMap %s: popularity not saved: %s", name, error)
            return False
        return True

    async def save_periodically(self, controller: Controller, *, interval_s: float) -> None:
        """Write what a control core counts until cancelled, and then a last time.

        Only what was used since is worth writing: what decays does so by itself.
        """
        n_saved = 0  # a core counts from nothing: what it took before this began is new, too
        try:
            while True:
                await asyncio.sleep(interval_s)
                n_saved = await self._save_if_used(controller, n_saved)
        finally:
            try:
                async with asyncio.timeout(FINAL_WRITE_TIMEOUT_S):
                    await self._save_if_used(controller, n_saved)
            except TimeoutError:
                logger.warning("%s: final save of popularity timed out", self._ctx.name)

    async def _save_if_used(self, controller: Controller, n_saved: int) -> int:
        """Write the counts if functions were used since; return the uses that are written."""
        n_used = controller.function_stats.rows.total()
        if n_used == n_saved:
            return n_saved
        is_written = await self.write(
            controller.function_stats.popularity_by_stable_key(controller.clock())
        )
        return n_used if is_written else n_saved

    def _config_map(self, text: str) -> Object:
        name = popularity_config_map_name(self._ctx.name)
        return new_object(
            self._ctx, CONFIG_MAP, name, component=Component.CONTROL, data={POPULARITY_KEY: text}
        )


def _most_popular(rows: Mapping[str, float]) -> dict[str, float]:
    """Return the largest counts, as many as a ConfigMap should have."""
    selected: dict[str, float] = {}
    n_chars = 0
    for shape, count in sorted(rows.items(), key=lambda item: -item[1]):
        n_chars += len(shape) + 24
        if n_chars > MAX_POPULARITY_CHARS:
            break
        selected[shape] = count
    return selected
