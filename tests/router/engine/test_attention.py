"""The best attention that can be had is taken, and only where it works."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from faasmoe_router.engine.attention import use_batchable_attention

NONE = (("flash_attention_3", lambda: False), ("flash_attention_2", lambda: False))
SECOND = (("flash_attention_3", lambda: False), ("flash_attention_2", lambda: True))
BOTH = (("flash_attention_3", lambda: True), ("flash_attention_2", lambda: True))


class Model(SimpleNamespace):
    """What is asked of a model, and what it was set to."""

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


def attention_of(flash: Any, **changes: Any) -> str:
    model = Model(
        **{
            "config": SimpleNamespace(_attn_implementation="sdpa"),
            "device": torch.device("cuda"),
            "dtype": torch.bfloat16,
            "_supports_flash_attn": True,
            "_supports_sdpa": True,
            **changes,
        }
    )
    use_batchable_attention(model, flash=flash)
    return str(model.config._attn_implementation)


def config(name: str) -> SimpleNamespace:
    return SimpleNamespace(_attn_implementation=name)


@pytest.mark.parametrize(
    ("flash", "expected"),
    [(BOTH, "flash_attention_3"), (SECOND, "flash_attention_2"), (NONE, "sdpa")],
)
def test_a_gpu_gets_the_best_that_is_installed(flash: Any, expected: str) -> None:
    assert attention_of(flash) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"device": torch.device("cpu")},
        {"dtype": torch.float32},
        {"_supports_flash_attn": False},
    ],
)
def test_flash_is_not_taken_where_it_cannot_run(changes: dict[str, Any]) -> None:
    assert attention_of(BOTH, **changes) == "sdpa"
    assert attention_of(BOTH, _supports_sdpa=False, **changes) == "paged|eager"


@pytest.mark.parametrize("given", ["flash_attention_2", "paged|eager"])
def test_what_was_set_stays(given: str) -> None:
    assert attention_of(BOTH, config=config(given)) == given
