"""What the zygote of routers with vLLM imports for them, and for the engines that they fork."""

from __future__ import annotations

from faasmoe_transformers.fast_import import prepare_import_of_names


def import_vllm() -> None:
    """Import what a router and its engine need, which takes seconds."""
    prepare_import_of_names()
    import vllm.v1.engine.core  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    import faasmoe_router.vllm_backend.process

    load_general_plugins()
    if current_platform.is_cpu():
        import faasmoe_router.vllm_backend.cpu_worker  # noqa: F401
