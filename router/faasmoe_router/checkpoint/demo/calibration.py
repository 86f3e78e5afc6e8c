"""What the dense model's feed-forward blocks see while it answers ordinary questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ANSWER_TOKENS = 160
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short story about a cat.",
    "How do I boil an egg?",
    "What is machine learning?",
    "Tell me about the moon.",
    "Give me three tips for sleeping well.",
    "Explain photosynthesis.",
    "Who was Isaac Newton?",
    "Write a poem about the sea.",
    "What is Kubernetes?",
    "Summarise the history of Rome.",
)
STEPS = ANSWER_TOKENS + len(PROMPTS)


def calibration_inputs(
    dense: Any, tokenizer: Any, *, step: Callable[[], None]
) -> list[torch.Tensor]:
    """Return each layer's feed-forward inputs, [N, H], seen while `dense` answers PROMPTS.

    Answers are drawn with torch's global generator; `step` is called STEPS times at most.
    """
    answers = _answers(dense, tokenizer, step)  # [prompts, T]
    seen: list[list[torch.Tensor]] = [[] for _ in dense.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(_recorder(inputs))
        for layer, inputs in zip(dense.model.layers, seen, strict=True)
    ]
    for row in answers:
        dense(row[row != tokenizer.pad_token_id][None])
        step()
    for hook in hooks:
        hook.remove()
    return [torch.cat(inputs) for inputs in seen]  # [N, H] each


def _answers(dense: Any, tokenizer: Any, step: Callable[[], None]) -> torch.Tensor:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )

    def count(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        step()
        return torch.zeros(len(ids), dtype=torch.bool)  # [B]: never a reason to stop

    answers: torch.Tensor = dense.generate(
        **batch,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        stopping_criteria=[count],
    )
    return answers


def _recorder(inputs: list[torch.Tensor]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def record(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].squeeze(0))  # [T, H]

    return record
