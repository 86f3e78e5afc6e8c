"""Selection of the attention implementation, with and without flash attention."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from faasmoe_transformers.attention import select_attention_implementation

NO_FLASH = (("flash_attention_3", lambda: False), ("flash_attention_2", lambda: False))
ONLY_FLASH_2 = (("flash_attention_3", lambda: False), ("flash_attention_2", lambda: True))
BOTH_FLASH = (("flash_attention_3", lambda: True), ("flash_attention_2", lambda: True))


class FakeModel(SimpleNamespace):
    """The attributes that the selection reads, and the implementation it sets."""

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


def selected_attention(flash_candidates: Any, **changes: Any) -> str:
    model = FakeModel(
        **{
            "config": SimpleNamespace(_attn_implementation="sdpa"),
            "device": torch.device("cuda"),
            "dtype": torch.bfloat16,
            "_supports_flash_attn": True,
            "_supports_sdpa": True,
            **changes,
        }
    )
    select_attention_implementation(model, flash_candidates=flash_candidates)
    return str(model.config._attn_implementation)


def config(name: str) -> SimpleNamespace:
    return SimpleNamespace(_attn_implementation=name)


@pytest.mark.parametrize(
    ("flash", "expected"),
    [(BOTH_FLASH, "flash_attention_3"), (ONLY_FLASH_2, "flash_attention_2"), (NO_FLASH, "sdpa")],
)
def test_gpu_selects_the_best_installed_flash_attention(flash: Any, expected: str) -> None:
    assert selected_attention(flash) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"device": torch.device("cpu")},
        {"dtype": torch.float32},
        {"_supports_flash_attn": False},
    ],
)
def test_flash_attention_is_not_selected_where_it_cannot_run(changes: dict[str, Any]) -> None:
    assert selected_attention(BOTH_FLASH, **changes) == "sdpa"
    assert selected_attention(BOTH_FLASH, _supports_sdpa=False, **changes) == "paged|eager"


@pytest.mark.parametrize("given", ["flash_attention_2", "paged|eager"])
def test_keeps_a_suitable_implementation(given: str) -> None:
    assert selected_attention(BOTH_FLASH, config=config(given)) == given
