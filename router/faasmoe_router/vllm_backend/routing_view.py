"""The routing table where requests arrive: it says what to wait for, and calls nothing.

Functions are called by vLLM's worker, which watches the table itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local_functions import map_function
from faasmoe_router.dispatch.routing import RoutingIndex


class RoutingView:
    """A `FunctionDispatcher` for a link whose process calls no functions.

    Args:
        store: the prepared model.

    Attributes:
        routing: the current routing.
        load: the load of this process's calls: none.
    """

    def __init__(self, store: Store) -> None:
        self.routing = RoutingIndex.empty(store)
        self.load = LoadMeter()
        self._store = store

    def replace_table(self, table: RoutingTable) -> None:
        """Use another table; raises RoutingTableError and keeps the old one."""
        self.routing = RoutingIndex.from_table(table, self._store)

    def update_addresses(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Use other addresses of some functions; raises RoutingTableError and changes nothing."""
        self.routing = self.routing.with_addresses(version, addresses)

    def check_local(self, specs: Sequence[FunctionSpec]) -> None:
        """Check that functions can be computed locally; raises RouterError. Thread-safe."""
        for spec in specs:
            map_function(spec, self._store)
