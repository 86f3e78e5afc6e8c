"""What the zygote of routers with vLLM imports for them; vLLM's engine imports its own again."""

from __future__ import annotations


def import_vllm() -> None:
    """Import what a router needs, which takes seconds."""
    from vllm.plugins import load_general_plugins

    import faasmoe_router.vllm_backend.process  # noqa: F401

    load_general_plugins()
