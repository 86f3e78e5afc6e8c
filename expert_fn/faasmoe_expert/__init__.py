"""Sandboxes and the contracts they share with the router: wire, store, function table."""
