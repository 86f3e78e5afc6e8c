"""What a model's functions count of the memory that their sandboxes have of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from fake_platform import make_model

from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.function_memory import FunctionMemory
from faasmoe_operator.control.function_stats import FunctionStats
from faasmoe_operator.control.model import SANDBOX_PROCESS_BYTES
from faasmoe_operator.platforms.base import Sandbox

CAPACITY = 10


def functions_memory(n_sharing: list[int], *, sandbox_bytes: int) -> FunctionMemory:
    """Return the memory of a model with one attached function of 1 byte."""
    model = replace(make_model(2, capacity=CAPACITY), sandbox_bytes=sandbox_bytes)
    fleet = Fleet(model.functions, template=model.template)
    fleet.sync([Sandbox("s", "127.0.0.1:1", True, model.template.digest)], now=0.0)
    fleet.adopt("s", ["f0"])
    others: Any = {name: Mock() for name in ("executor", "publish", "request_reconcile")}
    return FunctionMemory(
        model,
        fleet,
        FunctionStats(model.functions, rows=None, now=0.0),
        clock=lambda: 0.0,
        scale_to_zero=lambda _: None,
        n_sharing=lambda: n_sharing[0],
        **others,
    )


@pytest.mark.parametrize(
    ("n_sharing", "sandbox_bytes"),
    [
        pytest.param(1, 16_000_000, id="its-own"),
        pytest.param(2, 9_000_000, id="half-of-the-process"),
        pytest.param(3, 9_000_000, id="at-least-its-part"),
        pytest.param(4, 5_500_000, id="a-quarter"),
        pytest.param(20, 2_875_000, id="many"),
    ],
)
def test_functions_count_their_part_of_a_process_that_models_share(
    n_sharing: int, sandbox_bytes: int
) -> None:
    memory = functions_memory([n_sharing], sandbox_bytes=SANDBOX_PROCESS_BYTES)
    (holder,) = memory.memory_holders()
    part_bytes = sandbox_bytes // CAPACITY
    assert (holder.size_bytes, holder.private_bytes) == (1 + part_bytes, part_bytes)
    assert memory.held_bytes() == memory.missing_bytes(()) == 1 + part_bytes
    assert n_sharing * sandbox_bytes >= SANDBOX_PROCESS_BYTES  # no process is left out


def test_sandboxes_without_a_common_limit_count_nothing() -> None:
    (holder,) = functions_memory([3], sandbox_bytes=0).memory_holders()
    assert (holder.size_bytes, holder.private_bytes) == (1, 0)


def test_parts_follow_the_models_that_share() -> None:
    n_sharing = [1]
    memory = functions_memory(n_sharing, sandbox_bytes=SANDBOX_PROCESS_BYTES)
    before = memory.memory_holders()
    assert memory.memory_holders() is before
    n_sharing[0] = 2
    assert memory.memory_holders() != before
