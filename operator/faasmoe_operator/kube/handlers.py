"""kopf's part: it watches, and hands every event over. It handles nothing and writes nothing.

kopf keeps no state in the objects here: there are only `on.event` handlers, so no finalizer, no
annotation and no progress is written; and it posts no events. The indices keep nothing: with them
kopf calls no handler before it has listed every kind, so the first event tells that the watches
are on, and whatever happens from then on is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import kopf

from faasmoe_operator.kube.connection import kubeconfig
from faasmoe_operator.kube.kinds import Kind, Object
from faasmoe_operator.kube.resync import selector_of

PREFIX = "faasmoe.dev"
SERVER_TIMEOUT_S = 300
CLIENT_TIMEOUT_S = 310
CONNECT_TIMEOUT_S = 30
INACTIVITY_TIMEOUT_S = 70
"""The API server sends a bookmark each minute: a watch that is silent for longer is dead."""
CHUNK_SIZE = 500
ERROR_BACKOFFS_S = (1, 1, 2, 3, *[5] * 12)
"""An API server that comes back is to be seen within seconds; after a minute kopf begins anew."""

Deliver = Callable[[Kind, str | None, Object], None]
"""Takes an event: the object's kind, the event's type (None while listing), and the object."""


def make_registry(kinds: Sequence[Kind], deliver: Deliver) -> kopf.OperatorRegistry:
    """Return handlers that hand every event of these kinds over."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(_log_in)
    for kind in kinds:
        _watch(registry, kind, deliver)
    return registry


def make_settings(kinds: Sequence[Kind]) -> kopf.OperatorSettings:
    """Return kopf's settings."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # neither CRDs nor namespaces are to be listed
    settings.peering.standalone = True
    settings.networking.error_backoffs = ERROR_BACKOFFS_S
    settings.watching.server_timeout = SERVER_TIMEOUT_S
    settings.watching.client_timeout = CLIENT_TIMEOUT_S
    settings.watching.connect_timeout = CONNECT_TIMEOUT_S
    settings.watching.inactivity_timeout = INACTIVITY_TIMEOUT_S
    settings.watching.chunk_size = CHUNK_SIZE
    settings.persistence.finalizer = f"{PREFIX}/operator"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=PREFIX, v1=False)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=PREFIX)
    for kind in kinds:
        if selector := selector_of(kind):
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = selector
    return settings


def _watch(registry: kopf.OperatorRegistry, kind: Kind, deliver: Deliver) -> None:
    async def hand_over(event: kopf.RawEvent, **_: Any) -> None:
        deliver(kind, event["type"], dict(event["object"]))

    async def index_nothing(**_: Any) -> None:
        return None

    kopf.index(kind.group, kind.version, kind.plural, id=f"list-{kind.plural}", registry=registry)(
        index_nothing
    )
    kopf.on.event(
        kind.group, kind.version, kind.plural, id=f"watch-{kind.plural}", registry=registry
    )(hand_over)


async def _log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """Log kopf in as the client is: by the pod's service account, or by KUBECONFIG."""
    if kubeconfig() is None:
        return kopf.login_with_service_account(**kwargs)
    return kopf.login_with_kubeconfig(**kwargs)
