"""The HTTP server of a sandbox."""
