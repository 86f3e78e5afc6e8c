import pytest
import torch

from faasmoe_router.engine.sampler import LogprobQueue, SampledLogprob, compute_logprobs


def test_logprobs_equal_log_softmax_of_scores() -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)) * 4
    chosen = torch.tensor([7, 0, 39])
    entries = compute_logprobs(scores, chosen, [0, 2, 5])
    expected = scores.log_softmax(-1)
    for row, (entry, n_top) in enumerate(zip(entries, [0, 2, 5], strict=True)):
        assert entry.token == chosen[row]
        assert entry.logprob == pytest.approx(expected[row, chosen[row]].item(), abs=1e-5)
        values, tokens = expected[row].topk(n_top)
        assert [token for token, _ in entry.top_logprobs] == tokens.tolist()
        assert [value for _, value in entry.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-5
        )


def test_top_logprobs_are_limited_to_the_vocabulary() -> None:
    [entry] = compute_logprobs(torch.zeros(1, 3), torch.tensor([1]), [20])
    assert len(entry.top_logprobs) == 3


def test_requested_tokens_replace_the_top_ones() -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)) * 4
    entries = compute_logprobs(scores, torch.tensor([7, 0, 5]), [1, 1, 1], [(3, 30), (), (5, 6)])
    expected = scores.log_softmax(-1)
    assert [[token for token, _ in entry.top_logprobs] for entry in entries] == [
        [7, 3, 30],
        [int(scores[1].argmax())],
        [5, 6],
    ]
    for row, entry in enumerate(entries):
        for token, logprob in entry.top_logprobs:
            assert logprob == pytest.approx(expected[row, token].item(), abs=1e-5)


def test_queue_returns_entries_in_order() -> None:
    queue = LogprobQueue(0)
    entries = [SampledLogprob(token, -1.0) for token in range(3)]
    for entry in entries:
        queue.append(entry)
    assert [queue.pop_first() for _ in entries] == entries
