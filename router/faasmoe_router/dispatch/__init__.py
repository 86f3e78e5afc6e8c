"""Dispatch: a batch's tokens grouped by function, called in parallel, partial sums added.

Knows routing results and addresses; knows nothing of requests, tenants or text.
"""

from faasmoe_router.dispatch.dispatcher import Dispatcher
from faasmoe_router.dispatch.experts_backend import (
    EXPERTS_IMPLEMENTATION,
    bind_experts,
    register_implementation,
)
from faasmoe_router.dispatch.routing import RoutingIndex

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "Dispatcher",
    "RoutingIndex",
    "bind_experts",
    "register_implementation",
]
