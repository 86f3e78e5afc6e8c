"""The command line of the comparison with other servers."""

import argparse

import pytest
from benchmarks.peers.command import FOR_USERS, add_options, complete, parse_arguments


def test_quick_is_one_round_of_fewer_figures() -> None:
    quick, full = parse_arguments(["--quick"]), parse_arguments([])
    assert (quick.rounds, quick.concurrency, quick.ttft_concurrency) == (1, (1, 8), (1,))
    assert (full.rounds, full.concurrency, full.ttft_concurrency) == (3, (1, 8, 32), (1, 8, 32))
    assert "int4" not in quick.precisions
    assert full.precisions == ("bf16", "int8", "int4")


def test_given_options_win_over_quick() -> None:
    arguments = parse_arguments(["--quick", "--rounds", "2", "--concurrency", "32", "--vllm"])
    assert (arguments.rounds, arguments.concurrency) == (2, (32,))
    assert arguments.servers == ("faasmoe", "llama", "vllm")


def test_our_vllm_engine_comes_with_vllm_itself() -> None:
    arguments = parse_arguments(["--servers", "faasmoe", "--vllm-engine"])
    assert arguments.servers == ("faasmoe", "vllm", "faasmoe-vllm")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--models", "gpt", "got gpt, expected some of qwen, demo"),
        ("--precisions", "fp8", "got fp8, expected some of bf16"),
        ("--concurrency", "0", "got 0, expected numbers from 1"),
    ],
)
def test_unknown_values_are_named(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([option, value])
    assert expected in capsys.readouterr().err


def test_users_get_one_checkpoint_idle_and_with_six_tenants() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, FOR_USERS)
    found = complete(parser.parse_args([]), FOR_USERS)
    assert (found.models, found.precisions, found.concurrency) == (("qwen",), ("int8",), (1, 6))
    assert found.rest > 0
    assert parse_arguments([]).rest == 0
