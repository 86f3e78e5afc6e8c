from __future__ import annotations

from typing import Any

import pytest

from faasmoe_router.tenants.service import (
    ANONYMOUS,
    Caller,
    NullRequestUsageRecorder,
    TenantUsageRecorder,
)

USER = {"role": "user", "content": "hi"}


def recorder(n_sequences: int = 2) -> tuple[TenantUsageRecorder, list[Any]]:
    finished: list[Any] = []
    made = TenantUsageRecorder({}, n_sequences, 10, on_finish=lambda *usage: finished.append(usage))
    return made, finished


def test_a_request_whose_sequences_all_finish_is_completed() -> None:
    made, finished = recorder()
    made.record_started()
    for index in range(2):
        made.record_tokens(3, is_last=False)
        made.record_tokens(index, is_last=True)
    made.finish()
    assert finished == [(10, 7, "completed")]


def test_an_aborted_request_is_cancelled_and_its_tokens_count() -> None:
    made, finished = recorder()
    made.record_started()
    made.record_tokens(3, is_last=True)
    made.record_tokens(2, is_last=False)
    made.finish()
    assert finished == [(10, 5, "cancelled")]


def test_a_request_that_never_started_counts_no_tokens() -> None:
    made, finished = recorder()
    made.finish()
    assert finished == [(0, 0, "cancelled")]


def test_a_failure_is_recorded_as_failed() -> None:
    made, finished = recorder()
    made.record_started()
    made.record_failure()
    made.finish()
    assert finished == [(10, 0, "failed")]


def test_only_the_first_finish_counts() -> None:
    made, finished = recorder()
    made.finish("limited")
    made.finish()
    assert finished == [(0, 0, "limited")]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_prompt_is_prepended_only_without_a_system_message(role: str) -> None:
    own = {"role": role, "content": "mine"}
    caller = Caller("a", system_prompt="default")
    assert caller.with_system_prompt([USER]) == [{"role": "system", "content": "default"}, USER]
    assert caller.with_system_prompt([own, USER]) == [own, USER]
    assert caller.with_system_prompt([USER, own]) == [USER, own]


def test_an_anonymous_caller_has_no_limits() -> None:
    assert ANONYMOUS.with_system_prompt([USER]) == [USER]
    assert ANONYMOUS.model_names("m") == ("m",)
    assert ANONYMOUS.effective_max_model_len(7) == 7
    assert NullRequestUsageRecorder().headers == {}


def test_an_alias_equal_to_the_model_name_is_listed_once() -> None:
    assert Caller("a", model_alias="m").model_names("m") == ("m",)


def test_the_effective_model_length_is_the_smaller_limit() -> None:
    assert Caller("a", max_model_len=10).effective_max_model_len(7) == 7
    assert Caller("a", max_model_len=5).effective_max_model_len(7) == 5
