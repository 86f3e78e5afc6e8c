"""Checkpoint preparation: from a Hugging Face checkpoint to a store; and the demo model.

Streams: reads one parameter at a time, by transformers' own conversion rules, straight into the
files that sandboxes and routers map (`faasmoe_contracts.store` reads them).
"""

from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import PrepareError

__all__ = ["PrepareError", "prepare"]
