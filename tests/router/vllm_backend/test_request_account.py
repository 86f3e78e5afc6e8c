from collections.abc import Mapping
from dataclasses import dataclass, field

from faasmoe_router.tenants.usage import RequestOutcome
from faasmoe_router.vllm_backend.generation_span import GenerationTrace
from faasmoe_router.vllm_backend.request_account import RequestAccount
from faasmoe_tracing import NO_SPAN


@dataclass
class Recorder:
    headers: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    n_last: int = 0

    def record_started(self) -> None: ...

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        self.tokens += n_tokens
        self.n_last += is_last

    def record_failure(self) -> None: ...

    def finish(self, outcome: RequestOutcome | None = None) -> None: ...


@dataclass
class Choice:
    index: int
    token_ids: list[int]
    finish_reason: str | None = None


def test_outputs_with_new_tokens_and_outputs_with_all_so_far_count_the_same() -> None:
    deltas = [[Choice(0, [1, 2])], [Choice(0, [3]), Choice(1, [4])], [Choice(1, [5], "stop")]]
    totals = [[Choice(0, [1, 2])], [Choice(0, [1, 2, 3]), Choice(1, [4])]]
    totals.append([Choice(1, [4, 5], "stop")])
    for outputs, is_delta in ((deltas, True), (totals, False)):
        recorder = Recorder()
        account = RequestAccount("a", "1", 10, recorder, GenerationTrace(NO_SPAN, 10))
        counts = [account.add(o, n_cached=4, is_delta=is_delta) for o in outputs]
        assert counts == [(8, 2), (2, 2), (1, 1)]
        assert (recorder.tokens, recorder.n_last) == (5, 1)


def test_the_end_of_a_choice_counts_once() -> None:
    recorder = Recorder()
    account = RequestAccount("a", "1", 1, recorder, GenerationTrace(NO_SPAN, 1))
    for _ in range(2):
        account.add([Choice(0, [7], "length")], n_cached=0, is_delta=False)
    assert (recorder.tokens, recorder.n_last) == (1, 1)
