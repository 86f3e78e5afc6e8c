"""Sandboxes: processes that attach expert functions and compute their frames."""
