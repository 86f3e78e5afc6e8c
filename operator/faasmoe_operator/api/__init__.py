"""Kubernetes API types of the `faasmoe.dev` group."""
