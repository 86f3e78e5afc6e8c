from copy import deepcopy
from types import SimpleNamespace

from faasmoe_router.engine.generation import GenerationRequest, SamplingParams, StopConditions
from faasmoe_router.engine.logits_state import LogitsState, TokenHistory
from faasmoe_router.engine.sampler import FORBIDDEN, DrawParams, LogitBias, Penalties

PROMPT = (5, 6, 5)
END = 9


def _logits_state(choosing: SamplingParams, ending: StopConditions | None = None) -> LogitsState:
    request = GenerationRequest(PROMPT, 20, choosing, ending or StopConditions())
    steps = LogitsState.for_request(request, [END])
    assert steps is not None
    return steps


def _token_history(output: list[int], n_preempted: int = 0) -> TokenHistory:
    """What transformers has of a request that was preempted after so many tokens."""
    return TokenHistory(
        SimpleNamespace(
            initial_tokens=[*PROMPT, *output[:n_preempted]],
            generated_tokens=output[n_preempted:],
        )
    )


def test_a_greedy_request_has_no_steps() -> None:
    assert LogitsState.for_request(GenerationRequest(PROMPT, 20), [END]) is None


def test_a_preemption_changes_nothing_and_copies_nothing() -> None:
    choosing = SamplingParams(
        draw=DrawParams(1.0, seed=3),
        penalties=Penalties(frequency=1.0, repetition=1.2),
        logit_bias=LogitBias(bad_words_token_ids=((7, 8),)),
    )
    output = [7, 1, 7]
    straight, preempted = _logits_state(choosing), _logits_state(choosing)
    for n_tokens in range(len(output) + 1):
        expected = straight.plan_row(0, _token_history(output[:n_tokens]))
        preempted = deepcopy({"logits_state": preempted})["logits_state"]
        plan = preempted.plan_row(
            0, _token_history(output[:n_tokens], n_preempted=max(n_tokens - 1, 0))
        )
        assert plan.draw == expected.draw
        assert plan.bias == expected.bias
        assert plan.penalties is not None
        assert expected.penalties is not None
        assert plan.penalties.token_counts.token_ids.equal(
            expected.penalties.token_counts.token_ids
        )
        assert plan.penalties.token_counts.counts.equal(expected.penalties.token_counts.counts)
    assert plan.bias is not None
    assert plan.bias.adjustments == [(8, FORBIDDEN)]
    assert plan.penalties is not None
    assert plan.penalties.token_counts.token_ids.tolist() == [5, 6, 7, 1]
    assert plan.penalties.token_counts.counts.tolist() == [0, 0, 2, 1]


def test_presence_and_frequency_regard_the_output_alone() -> None:
    plan = _logits_state(SamplingParams(penalties=Penalties(presence=1.0))).plan_row(
        0, _token_history([5])
    )
    assert plan.penalties is not None
    assert plan.penalties.token_counts.token_ids.tolist() == [5]


def test_bad_words_regard_the_output_alone() -> None:
    steps = _logits_state(SamplingParams(logit_bias=LogitBias(bad_words_token_ids=((6, 5, 1),))))
    plan = steps.plan_row(0, _token_history([]))
    assert plan.bias is not None
    assert plan.bias.adjustments == []


def test_end_tokens_are_forbidden_until_there_are_enough() -> None:
    steps = _logits_state(SamplingParams(), StopConditions(min_tokens=2))
    early = steps.plan_row(0, _token_history([1])).bias
    assert early is not None
    assert early.adjustments == [(END, FORBIDDEN)]
    assert steps.plan_row(0, _token_history([1, 2])).bias is None
