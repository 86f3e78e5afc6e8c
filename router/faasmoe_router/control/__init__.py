"""The router's link to the control plane: the function table, load reports, wakes, cold starts.

Runs on the API's event loop. Knows functions and addresses; knows nothing of experts, text or
tensors.
"""

from faasmoe_router.control.link import ControlLink, LinkSettings

__all__ = ["ControlLink", "LinkSettings"]
