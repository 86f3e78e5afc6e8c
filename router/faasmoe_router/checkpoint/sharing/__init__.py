"""Sharing of equal weights between stores: experts and the router's tensors, by their digests."""

from faasmoe_router.checkpoint.sharing.share import share_equal_parts
from faasmoe_router.checkpoint.sharing.stores import find_stores

__all__ = ["find_stores", "share_equal_parts"]
