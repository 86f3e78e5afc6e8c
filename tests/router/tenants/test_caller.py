from __future__ import annotations

from typing import Any

import pytest

from faasmoe_router.tenants.caller import ANONYMOUS, Caller, NullUsageRecorder, TenantUsageRecorder

USER = {"role": "user", "content": "hi"}


def recorder(n_sequences: int = 2) -> tuple[TenantUsageRecorder, list[Any]]:
    settled: list[Any] = []
    made = TenantUsageRecorder({}, n_sequences, 10, on_finish=lambda *what: settled.append(what))
    return made, settled


def test_what_ran_to_its_end_is_completed() -> None:
    made, settled = recorder()
    made.record_started()
    for index in range(2):
        made.record_tokens(3, is_last=False)
        made.record_tokens(index, is_last=True)
    made.finish()
    assert settled == [(10, 7, "completed")]


def test_what_was_given_up_is_cancelled_and_pays_for_what_it_took() -> None:
    made, settled = recorder()
    made.record_started()
    made.record_tokens(3, is_last=True)
    made.record_tokens(2, is_last=False)
    made.finish()
    assert settled == [(10, 5, "cancelled")]


def test_what_never_ran_pays_nothing() -> None:
    made, settled = recorder()
    made.finish()
    assert settled == [(0, 0, "cancelled")]


def test_a_fault_of_ours_is_told_as_one() -> None:
    made, settled = recorder()
    made.record_started()
    made.record_failure()
    made.finish()
    assert settled == [(10, 0, "failed")]


def test_it_is_settled_once_by_the_first_to_know() -> None:
    made, settled = recorder()
    made.finish("limited")
    made.finish()
    assert settled == [(0, 0, "limited")]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_conversation_with_a_system_message_is_left_alone(role: str) -> None:
    own = {"role": role, "content": "mine"}
    caller = Caller("a", system_prompt="default")
    assert caller.with_system_prompt([USER]) == [{"role": "system", "content": "default"}, USER]
    assert caller.with_system_prompt([own, USER]) == [own, USER]
    assert caller.with_system_prompt([USER, own]) == [USER, own]


def test_a_caller_without_bounds_changes_nothing() -> None:
    assert ANONYMOUS.with_system_prompt([USER]) == [USER]
    assert ANONYMOUS.model_names("m") == ("m",)
    assert ANONYMOUS.effective_max_model_len(7) == 7
    assert NullUsageRecorder().headers == {}


def test_an_alias_that_is_the_name_is_listed_once() -> None:
    assert Caller("a", model_alias="m").model_names("m") == ("m",)


def test_a_caller_s_context_is_at_most_the_engine_s() -> None:
    assert Caller("a", max_model_len=10).effective_max_model_len(7) == 7
    assert Caller("a", max_model_len=5).effective_max_model_len(7) == 5
