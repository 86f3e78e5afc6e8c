"""Where in a text its grammar begins: at once, or after reasoning."""

import pytest

from faasmoe_router.engine.generation import ReasoningTokens
from faasmoe_router.engine.grammar_state import GrammarState

START, END = 1, 2


class FakeMatcher:
    """Accepts two tokens."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    @property
    def is_terminated(self) -> bool:
        return len(self.accepted) == 2

    def accept_token(self, token: int) -> None:
        self.accepted.append(token)


def new_state(reasoning: ReasoningTokens | None) -> GrammarState:
    return GrammarState(FakeMatcher(), reasoning)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reasoning", "tokens", "constrained"),
    [
        pytest.param(None, [7, 8], [7, 8], id="no-reasoning"),
        pytest.param(None, [START, END], [START, END], id="marks-without-reasoning"),
        pytest.param(
            ReasoningTokens(START, END, is_open=True), [7, START, END, 8, 9], [8, 9], id="open"
        ),
        pytest.param(ReasoningTokens(START, END, is_open=True), [END, 8, 9], [8, 9], id="empty"),
        pytest.param(
            ReasoningTokens(START, END, is_open=False), [START, 7, END, 8, 9], [8, 9], id="opened"
        ),
        pytest.param(ReasoningTokens(START, END, is_open=False), [8, 9], [8, 9], id="skipped"),
        pytest.param(
            ReasoningTokens(START, END, is_open=False), [8, START], [8, START], id="opened-late"
        ),
    ],
)
def test_grammar_begins_after_the_reasoning(
    reasoning: ReasoningTokens | None, tokens: list[int], constrained: list[int]
) -> None:
    state = new_state(reasoning)
    for token in tokens:
        assert not state.is_terminated
        state.accept_token(token)
    state.accept_token(99)  # ignored at the end
    assert state.matcher.accepted == constrained  # type: ignore[attr-defined]
    assert state.n_tokens_at_end == len(tokens)


def test_only_the_first_token_may_open_reasoning() -> None:
    assert new_state(None).free_token is None
    assert new_state(ReasoningTokens(START, END, is_open=True)).free_token is None
    state = new_state(ReasoningTokens(START, END, is_open=False))
    assert state.free_token == START
    state.accept_token(7)
    assert state.free_token is None
