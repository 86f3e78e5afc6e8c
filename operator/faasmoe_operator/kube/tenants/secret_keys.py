"""The API keys in the Secrets of Tenants; only their digests are kept.

A Secret is read with `get`, as the operator may not list Secrets: at once when a Tenant first names
it, and again every few seconds, so that a key is accepted or revoked about that long after.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from faasmoe_contracts.api_keys import MAX_KEYS, KeyReadError, content_digest
from faasmoe_operator.aio import gather_limited
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.types import SECRET, Object

logger = logging.getLogger(__name__)

READ_INTERVAL_S = 5.0
MAX_READS_PER_S = 20.0
PARALLEL_READS = 10

SecretRef = tuple[str, str]
"""Namespace and name of a Secret."""


@dataclass(frozen=True, slots=True)
class SecretState:
    """What is known of one Secret.

    Attributes:
        digests: digests of its keys by name, in hexadecimal.
        is_missing: whether there is no such Secret.
        problems: what is wrong with single keys, or with reading it; without parts of keys.
    """

    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_missing: bool = False
    problems: tuple[str, ...] = ()


def parse_secret(secret: Object | None) -> SecretState:
    """Return the state of a Secret as the API server gives it; None if it does not exist."""
    if secret is None:
        return SecretState(is_missing=True)
    data = secret.get("data") or {}
    if len(data) > MAX_KEYS:
        return SecretState(problems=(f"got {len(data)} keys, expected at most {MAX_KEYS}",))
    digests, problems = {}, []
    for name, value in sorted(data.items()):
        try:
            content = base64.b64decode(value or "", validate=True)
            digests[name] = content_digest(content, where=name).hex()
        except (KeyReadError, binascii.Error) as error:
            problems.append(str(error))
    return SecretState(digests, problems=tuple(problems))


class SecretKeys:
    """Reads Secrets again and again.

    Args:
        api: the API server.

    Attributes:
        states: what is known of each Secret.
    """

    def __init__(self, api: KubeApi) -> None:
        self.states: dict[SecretRef, SecretState] = {}
        self._api = api
        self._read_at_s: dict[SecretRef, float] = {}

    def interval_s(self) -> float:
        """Return the time between two reads of a Secret; longer with many."""
        return max(READ_INTERVAL_S, len(self.states) / MAX_READS_PER_S)

    async def refresh(self, wanted: Collection[SecretRef], now_s: float) -> None:
        """Read those Secrets that are due, and forget those that nobody names any more.

        A Secret that cannot be read keeps its keys.
        """
        for reference in self.states.keys() - set(wanted):
            del self.states[reference], self._read_at_s[reference]
        interval_s = self.interval_s()
        due = [
            reference
            for reference in wanted
            if now_s - self._read_at_s.get(reference, float("-inf")) >= interval_s
        ]
        await gather_limited(due, self._read, limit=PARALLEL_READS)
        self._read_at_s |= dict.fromkeys(due, now_s)

    async def _read(self, reference: SecretRef) -> None:
        try:
            self.states[reference] = parse_secret(await self._api.get(SECRET, *reference))
        except KubeApiError as error:
            logger.warning("Secret %s/%s: not read: %s", *reference, error)
            known = self.states.get(reference, SecretState())
            problem = f"cannot be read ({error.reason or error.status})"
            self.states[reference] = SecretState(known.digests, problems=(problem,))
