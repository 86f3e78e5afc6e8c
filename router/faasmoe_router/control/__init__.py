"""The router's link to the control plane: routing table, load and usage reports, activation.

Runs on the API server's event loop. Knows functions, addresses and tenants' totals; knows nothing
of experts, text or tensors.
"""

from faasmoe_router.control.link import ControlLink, LinkSettings

__all__ = ["ControlLink", "LinkSettings"]
