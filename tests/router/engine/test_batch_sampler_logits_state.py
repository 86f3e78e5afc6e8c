"""Planning of logits processing per request, across preemptions."""

from copy import deepcopy

from faasmoe_router.engine.batch_sampler import LogitsState, TokenHistory
from faasmoe_router.engine.generation import GenerationRequest, SamplingParams, StopConditions
from faasmoe_router.engine.sampler import FORBIDDEN, DrawParams, LogitBias, Penalties

PROMPT = (5, 6, 5)
EOS = 9


def _logits_state(
    params: SamplingParams, stop_conditions: StopConditions | None = None
) -> LogitsState:
    request = GenerationRequest(PROMPT, 20, params, stop_conditions or StopConditions())
    logits_state = LogitsState.for_request(request, [EOS])
    assert logits_state is not None
    return logits_state


def _token_history(output: list[int], n_preempted: int = 0) -> TokenHistory:
    """The tokens of a request that was preempted after `n_preempted` output tokens."""
    return TokenHistory([*PROMPT, *output[:n_preempted]], output[n_preempted:])


def test_greedy_request_needs_no_logits_state() -> None:
    assert LogitsState.for_request(GenerationRequest(PROMPT, 20), [EOS]) is None


def test_preemption_keeps_state_without_copying_it() -> None:
    params = SamplingParams(
        draw=DrawParams(1.0, seed=3),
        penalties=Penalties(frequency=1.0, repetition=1.2),
        logit_bias=LogitBias(bad_words_token_ids=((7, 8),)),
    )
    output = [7, 1, 7]
    uninterrupted, preempted = _logits_state(params), _logits_state(params)
    for n_tokens in range(len(output) + 1):
        expected = uninterrupted.plan_row(0, _token_history(output[:n_tokens]))
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


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    plan = _logits_state(SamplingParams(penalties=Penalties(presence=1.0))).plan_row(
        0, _token_history([5])
    )
    assert plan.penalties is not None
    assert plan.penalties.token_counts.token_ids.tolist() == [5]


def test_bad_words_match_output_tokens_only() -> None:
    params = SamplingParams(logit_bias=LogitBias(bad_words_token_ids=((6, 5, 1),)))
    plan = _logits_state(params).plan_row(0, _token_history([]))
    assert plan.bias is not None
    assert plan.bias.adjustments == []


def test_stop_tokens_are_forbidden_before_min_tokens() -> None:
    logits_state = _logits_state(SamplingParams(), StopConditions(min_tokens=2))
    bias = logits_state.plan_row(0, _token_history([1])).bias
    assert bias is not None
    assert bias.adjustments == [(EOS, FORBIDDEN)]
    assert logits_state.plan_row(0, _token_history([1, 2])).bias is None
