"""The prompts of the comparison with other servers."""

from benchmarks.peers.workload import (
    LONG_PROMPT_TOKENS,
    PROMPT_TOKENS,
    decode_workload,
    prompt_workload,
    spaced_lengths,
)


def test_lengths_include_both_bounds() -> None:
    assert spaced_lengths(3, (100, 500)) == [100, 300, 500]
    assert spaced_lengths(1, (100, 500)) == [300]


def test_each_workload_has_its_lengths_and_concurrency() -> None:
    decode = decode_workload(8, vocabulary=100, round_number=0, is_quick=False)
    assert decode.concurrency == len(decode.prompts) == 8
    lengths = sorted(map(len, decode.prompts))
    assert (lengths[0], lengths[-1]) == PROMPT_TOKENS
    long = prompt_workload(32, vocabulary=100, round_number=0)
    lengths = sorted(map(len, long.prompts))
    assert (lengths[0], lengths[-1]) == LONG_PROMPT_TOKENS


def test_no_prompt_comes_twice_but_all_servers_get_the_same() -> None:
    workloads = [
        make
        for number in range(3)
        for concurrency in (1, 8, 32)
        for make in (
            decode_workload(concurrency, vocabulary=100, round_number=number, is_quick=False),
            prompt_workload(concurrency, vocabulary=100, round_number=number),
        )
    ]
    starts = [prompt[:16] for workload in workloads for prompt in workload.prompts]
    assert len(set(starts)) == len(starts)
    assert workloads[0] == decode_workload(1, vocabulary=100, round_number=0, is_quick=False)


def test_token_ids_are_below_the_vocabulary() -> None:
    workload = prompt_workload(8, vocabulary=7, round_number=0)
    assert {token for prompt in workload.prompts for token in prompt} == set(range(7))
