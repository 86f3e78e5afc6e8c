from copy import deepcopy
from types import SimpleNamespace

from faasmoe_router.engine.bias import FORBIDDEN, Bias
from faasmoe_router.engine.choosing import Choosing
from faasmoe_router.engine.ending import Ending
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.penalties import Penalties
from faasmoe_router.engine.sampling import SamplingParams
from faasmoe_router.engine.steps import Steps, TokensSoFar

PROMPT = (5, 6, 5)
END = 9


def _steps(choosing: Choosing, ending: Ending | None = None) -> Steps:
    request = GenerationRequest(PROMPT, 20, choosing, ending or Ending())
    steps = Steps.of(request, [END])
    assert steps is not None
    return steps


def _tokens(output: list[int], n_preempted: int = 0) -> TokensSoFar:
    """What transformers has of a request that was preempted after so many tokens."""
    return TokensSoFar(
        SimpleNamespace(
            initial_tokens=[*PROMPT, *output[:n_preempted]],
            generated_tokens=output[n_preempted:],
        )
    )


def test_a_greedy_request_has_no_steps() -> None:
    assert Steps.of(GenerationRequest(PROMPT, 20), [END]) is None


def test_a_preemption_changes_nothing_and_copies_nothing() -> None:
    choosing = Choosing(
        sampling=SamplingParams(1.0, seed=3),
        penalties=Penalties(frequency=1.0, repetition=1.2),
        bias=Bias(bad_words=((7, 8),)),
    )
    output = [7, 1, 7]
    straight, preempted = _steps(choosing), _steps(choosing)
    for n_tokens in range(len(output) + 1):
        expected = straight.plan(0, _tokens(output[:n_tokens]))
        preempted = deepcopy({"steps": preempted})["steps"]
        plan = preempted.plan(0, _tokens(output[:n_tokens], n_preempted=max(n_tokens - 1, 0)))
        assert plan.draw == expected.draw
        assert plan.biased == expected.biased
        assert plan.penalized is not None
        assert expected.penalized is not None
        assert plan.penalized.tokens.ids.equal(expected.penalized.tokens.ids)
        assert plan.penalized.tokens.counts.equal(expected.penalized.tokens.counts)
    assert plan.biased is not None
    assert plan.biased.changes == [(8, FORBIDDEN)]
    assert plan.penalized is not None
    assert plan.penalized.tokens.ids.tolist() == [5, 6, 7, 1]
    assert plan.penalized.tokens.counts.tolist() == [0, 0, 2, 1]


def test_presence_and_frequency_regard_the_output_alone() -> None:
    plan = _steps(Choosing(penalties=Penalties(presence=1.0))).plan(0, _tokens([5]))
    assert plan.penalized is not None
    assert plan.penalized.tokens.ids.tolist() == [5]


def test_bad_words_regard_the_output_alone() -> None:
    steps = _steps(Choosing(bias=Bias(bad_words=((6, 5, 1),))))
    plan = steps.plan(0, _tokens([]))
    assert plan.biased is not None
    assert plan.biased.changes == []


def test_end_tokens_are_forbidden_until_there_are_enough() -> None:
    steps = _steps(Choosing(), Ending(min_tokens=2))
    early = steps.plan(0, _tokens([1])).biased
    assert early is not None
    assert early.changes == [(END, FORBIDDEN)]
    assert steps.plan(0, _tokens([1, 2])).biased is None
