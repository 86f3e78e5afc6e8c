"""Dispatch: a batch's tokens grouped by function, called in parallel, partial sums added.

Knows routing results and addresses; knows nothing of requests, tenants or text.
"""

from faasmoe_router.dispatch.dispatcher import Dispatcher
from faasmoe_router.dispatch.experts import IMPLEMENTATION, bind_experts, register
from faasmoe_router.dispatch.routing import Routing

__all__ = ["IMPLEMENTATION", "Dispatcher", "Routing", "bind_experts", "register"]
