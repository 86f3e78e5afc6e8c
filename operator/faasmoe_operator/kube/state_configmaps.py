"""State that outlives the operator: ConfigMaps of each MoEModel for usage and popularity.

Usage is never thrown away: a corrupted text is retained under a second key for inspection.
Popularity is only an optimisation: a missing, corrupted or foreign ConfigMap counts as empty, and a
failed write costs a log line.
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
from faasmoe_operator.kube.types import CONFIG_MAP

logger = logging.getLogger(__name__)

USAGE_KEY = "accounts.json"
CORRUPTED_USAGE_KEY = "accounts.damaged"
MAX_USAGE_CHARS = 480 << 10  # with a corrupted text twice, within the 1 MiB of a ConfigMap
POPULARITY_KEY = "popularity.json"
MAX_POPULARITY_CHARS = 512 << 10
FINAL_WRITE_TIMEOUT_S = 2.0


class StateConfigMap:
    """Data of one ConfigMap that a MoEModel owns.

    Args:
        api: the Kubernetes API.
        cache: the object cache, which reads use.
        ctx: the MoEModel.
        name: name of the ConfigMap.
    """

    def __init__(self, api: KubeApi, cache: ObjectCache, ctx: ModelContext, *, name: str) -> None:
        self.name = name
        self._api = api
        self._cache = cache
        self._ctx = ctx

    def read(self) -> dict[str, str] | None:
        """Return the data; None if there is no ConfigMap or another object owns it."""
        config_map = self._cache.get(CONFIG_MAP, self._ctx.namespace, self.name)
        if config_map is None or controller_uid(config_map) != self._ctx.uid:
            return None
        return config_map.get("data") or {}

    async def write(self, data: dict[str, str]) -> None:
        """Replace the data; raises KubeApiError."""
        desired = new_object(
            self._ctx, CONFIG_MAP, self.name, component=Component.CONTROL, data=data
        )
        await self._api.apply(CONFIG_MAP, desired)


class ConfigMapUsageStore:
    """Keeps the usage ledger of one model in a ConfigMap; a UsageStore.

    Args:
        api: the Kubernetes API.
        cache: the object cache.
        ctx: the MoEModel.
        clock: returns seconds since the epoch.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        ctx: ModelContext,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config_map = StateConfigMap(api, cache, ctx, name=usage_config_map_name(ctx.name))
        self._clock = clock
        self._corrupted = ""

    def read(self) -> UsageLedger:
        """Return the saved ledger; a new one if there is none or it is corrupted."""
        data = self._config_map.read() or {}
        if USAGE_KEY not in data:
            return UsageLedger(self._clock())
        self._corrupted = data.get(CORRUPTED_USAGE_KEY, "")
        try:
            return decode_ledger(data[USAGE_KEY])
        except LEDGER_DECODE_ERRORS as error:
            logger.error(
                "ConfigMap %s: usage is corrupted, starting from zero: %s",
                self._config_map.name,
                error,
            )
            self._corrupted = data[USAGE_KEY][:MAX_USAGE_CHARS]
            return UsageLedger(self._clock())

    async def write(self, ledger: UsageLedger) -> bool:
        """Replace the saved ledger; return whether that succeeded. Failures are logged."""
        data = {USAGE_KEY: encode_ledger(ledger, max_chars=MAX_USAGE_CHARS)}
        if self._corrupted:
            data[CORRUPTED_USAGE_KEY] = self._corrupted
        try:
            await self._config_map.write(data)
        except KubeApiError as error:
            logger.error("ConfigMap %s: usage not saved: %s", self._config_map.name, error)
            return False
        return True


class PopularityConfigMap:
    """Keeps the functions' popularity of one model in a ConfigMap.

    Args:
        api: the Kubernetes API.
        cache: the object cache.
        ctx: the MoEModel.
        model_digest: digest of the store; the counts of another store are ignored.
        clock: returns seconds since the epoch, by which counts decay between two runs.
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
        self._config_map = StateConfigMap(
            api, cache, ctx, name=popularity_config_map_name(ctx.name)
        )
        self._digest = model_digest
        self._clock = clock

    def read(self) -> dict[str, float]:
        """Return the counts decayed to the present; empty if there are none to use."""
        data = self._config_map.read()
        if data is None:
            return {}
        text = data.get(POPULARITY_KEY, "")
        try:
            return decode_popularity(text, model_digest=self._digest, now_s=self._clock())
        except POPULARITY_DECODE_ERRORS as error:
            logger.warning(
                "ConfigMap %s: popularity ignored: %s", self._config_map.name, type(error).__name__
            )
            return {}

    async def write(self, rows: Mapping[str, float]) -> bool:
        """Replace the saved counts; return whether that succeeded. Failures are logged.

        Args:
            rows: decayed rows by the functions' stable keys.
        """
        text = encode_popularity(
            _most_popular(rows), model_digest=self._digest, now_s=self._clock()
        )
        try:
            await self._config_map.write({POPULARITY_KEY: text})
        except KubeApiError as error:
            logger.warning("ConfigMap %s: popularity not saved: %s", self._config_map.name, error)
            return False
        return True

    async def save_periodically(self, controller: Controller, *, interval_s: float) -> None:
        """Save a controller's popularity until cancelled, and then once more.

        Saves only after functions were used, since counts decay without being saved.

        Args:
            controller: the controller.
            interval_s: time between two writes, in seconds.
        """
        n_saved_rows = 0  # a new controller counts from zero; what it served before is unsaved too
        try:
            while True:
                await asyncio.sleep(interval_s)
                n_saved_rows = await self._save_if_used(controller, n_saved_rows)
        finally:
            try:
                async with asyncio.timeout(FINAL_WRITE_TIMEOUT_S):
                    await self._save_if_used(controller, n_saved_rows)
            except TimeoutError:
                logger.warning(
                    "ConfigMap %s: final save of popularity timed out", self._config_map.name
                )

    async def _save_if_used(self, controller: Controller, n_saved_rows: int) -> int:
        """Save the popularity if rows were computed since; return the number of rows saved."""
        n_rows = controller.function_stats.rows.total()
        if n_rows == n_saved_rows:
            return n_saved_rows
        is_written = await self.write(
            controller.function_stats.popularity_by_stable_key(controller.clock())
        )
        return n_rows if is_written else n_saved_rows


def _most_popular(rows: Mapping[str, float]) -> dict[str, float]:
    """Return the largest counts whose text fits in MAX_POPULARITY_CHARS."""
    selected: dict[str, float] = {}
    n_chars = 0
    for key, count in sorted(rows.items(), key=lambda item: -item[1]):
        n_chars += len(key) + 24
        if n_chars > MAX_POPULARITY_CHARS:
            break
        selected[key] = count
    return selected
