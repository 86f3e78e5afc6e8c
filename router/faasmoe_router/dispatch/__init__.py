"""Dispatch: computes MoE layers by calling expert functions in parallel and adding their outputs.

Knows routing tables, addresses and frames; knows nothing of requests, tenants or text. A layer goes
through `dispatcher` (entry point), `layer_batch` (grouping, frames, reduction), `layer_executor`
(how each group gets its output), `fanout` (parallel calls) and `transport` (connections).
"""

from faasmoe_router.dispatch.dispatcher import Dispatcher

__all__ = ["Dispatcher"]
