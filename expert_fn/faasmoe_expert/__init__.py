"""Sandboxes: processes that host expert functions and compute them."""
