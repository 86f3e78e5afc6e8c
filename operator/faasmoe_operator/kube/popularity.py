"""Popularity across restarts of the operator: one small ConfigMap for each model.

One that is missing, damaged or of another model is as good as none, and one that cannot be written
costs a log line.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.popularity_record import DAMAGED, decode, encode
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.cache import ObjectCache, controller_uid
from faasmoe_operator.kube.errors import ApiError
from faasmoe_operator.kube.kinds import CONFIG_MAP, Object
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.names import Component, popularity_name
from faasmoe_operator.kube.manifests.objects import new_object

logger = logging.getLogger(__name__)

FIELD = "popularity.json"
MAX_CHARS = 512 << 10
LAST_WRITE_TIMEOUT_S = 2.0


class PopularityMap:
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
        found = self._cache.get(CONFIG_MAP, self._ctx.namespace, popularity_name(self._ctx.name))
        if found is None or controller_uid(found) != self._ctx.uid:
            return {}
        text = (found.get("data") or {}).get(FIELD, "")
        try:
            return decode(text, model_digest=self._digest, now_s=self._clock())
        except DAMAGED as error:
            logger.warning(
                "ConfigMap %s: not used: %s", popularity_name(self._ctx.name), type(error).__name__
            )
            return {}

    async def write(self, rows: Mapping[str, float]) -> bool:
        """Write the counts in place of the last ones; return whether that went well."""
        text = encode(_largest(rows), model_digest=self._digest, now_s=self._clock())
        try:
            await self._api.apply(CONFIG_MAP, self._object(text))
        except ApiError as error:
            name = popularity_name(self._ctx.name)
            logger.warning("ConfigMap %s cannot be written: %s", name, error)
            return False
        return True

    async def keep(self, controller: Controller, *, interval_s: float) -> None:
        """Write what a control core counts until cancelled, and then a last time.

        Only what was used since is worth writing: what decays does so by itself.
        """
        written = 0  # a core counts from nothing: what it took before this began is new, too
        try:
            while True:
                await asyncio.sleep(interval_s)
                written = await self._write_new(controller, written)
        finally:
            try:
                async with asyncio.timeout(LAST_WRITE_TIMEOUT_S):
                    await self._write_new(controller, written)
            except TimeoutError:
                logger.warning("the popularity of %s was not written in time", self._ctx.name)

    async def _write_new(self, controller: Controller, written: int) -> int:
        """Write the counts if functions were used since; return the uses that are written."""
        used = controller.records.rows.total()
        if used == written:
            return written
        is_written = await self.write(controller.records.popularity(controller.clock()))
        return used if is_written else written

    def _object(self, text: str) -> Object:
        name = popularity_name(self._ctx.name)
        return new_object(
            self._ctx, CONFIG_MAP, name, component=Component.CONTROL, data={FIELD: text}
        )


def _largest(rows: Mapping[str, float]) -> dict[str, float]:
    """Return the largest counts, as many as a ConfigMap should have."""
    kept: dict[str, float] = {}
    n_chars = 0
    for shape, count in sorted(rows.items(), key=lambda item: -item[1]):
        n_chars += len(shape) + 24
        if n_chars > MAX_CHARS:
            break
        kept[shape] = count
    return kept
