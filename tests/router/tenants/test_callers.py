from __future__ import annotations

from typing import Any

import pytest

from faasmoe_router.tenants.callers import OPEN, Caller, OpenTicket, TenantTicket

USER = {"role": "user", "content": "hi"}


def ticket(n_sequences: int = 2) -> tuple[TenantTicket, list[Any]]:
    settled: list[Any] = []
    made = TenantTicket({}, n_sequences, 10, settle=lambda *what: settled.append(what))
    return made, settled


def test_what_ran_to_its_end_is_completed() -> None:
    made, settled = ticket()
    made.started()
    for index in range(2):
        made.took(3, is_last=False)
        made.took(index, is_last=True)
    made.end()
    assert settled == [(10, 7, "completed")]


def test_what_was_given_up_is_cancelled_and_pays_for_what_it_took() -> None:
    made, settled = ticket()
    made.started()
    made.took(3, is_last=True)
    made.took(2, is_last=False)
    made.end()
    assert settled == [(10, 5, "cancelled")]


def test_what_never_ran_pays_nothing() -> None:
    made, settled = ticket()
    made.end()
    assert settled == [(0, 0, "cancelled")]


def test_a_fault_of_ours_is_told_as_one() -> None:
    made, settled = ticket()
    made.started()
    made.failed()
    made.end()
    assert settled == [(10, 0, "failed")]


def test_it_is_settled_once_by_the_first_to_know() -> None:
    made, settled = ticket()
    made.end("limited")
    made.end()
    assert settled == [(0, 0, "limited")]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_conversation_with_a_system_message_is_left_alone(role: str) -> None:
    own = {"role": role, "content": "mine"}
    caller = Caller("a", system_prompt="default")
    assert caller.with_system_prompt([USER]) == [{"role": "system", "content": "default"}, USER]
    assert caller.with_system_prompt([own, USER]) == [own, USER]
    assert caller.with_system_prompt([USER, own]) == [USER, own]


def test_a_caller_without_bounds_changes_nothing() -> None:
    assert OPEN.with_system_prompt([USER]) == [USER]
    assert OPEN.model_names("m") == ("m",)
    assert OPEN.context_of(7) == 7
    assert OpenTicket().headers == {}


def test_an_alias_that_is_the_name_is_listed_once() -> None:
    assert Caller("a", model_alias="m").model_names("m") == ("m",)


def test_a_caller_s_context_is_at_most_the_engine_s() -> None:
    assert Caller("a", max_model_len=10).context_of(7) == 7
    assert Caller("a", max_model_len=5).context_of(7) == 5
