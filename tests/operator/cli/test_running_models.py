"""Which running models a command is about."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

from faasmoe_operator.cli import main, running_models
from faasmoe_operator.cli.runtime_dir import LocalInstance
from faasmoe_operator.errors import CommandError

QWEN = LocalInstance("qwen", "/m/qwen.yaml", 1, "http://a", "t", served_name="org/qwen")
TINY = LocalInstance("tiny", "/m/tiny.yaml", 2, "http://b", "t")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    running_models.add_model(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        (None, None, [QWEN, TINY]),
        ("qwen", None, [QWEN]),
        ("org/qwen", None, [QWEN]),
        (None, Path("/m/tiny.yaml"), [TINY]),
    ],
)
def test_models_are_selected_by_name_or_file(
    name: str | None, file: Path | None, expected: Sequence[LocalInstance]
) -> None:
    assert running_models.select_instances([QWEN, TINY], name=name, file=file) == expected


def test_what_does_not_run_is_an_error_that_names_what_does() -> None:
    with pytest.raises(CommandError, match=r"got other, expected one that runs: qwen \(/m/qwen"):
        running_models.select_instances([QWEN, TINY], name="other", file=None)
    with pytest.raises(CommandError, match="no instance is running"):
        running_models.select_instances([], name=None, file=None)


def test_one_of_several_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_models, "list_instances", lambda: [QWEN, TINY])
    assert running_models.select_instance("tiny", None) == TINY
    with pytest.raises(CommandError, match="several models are running, expected one of qwen"):
        running_models.select_instance(None, None)


def test_a_cluster_is_asked_for_by_its_options() -> None:
    assert running_models.cluster_of(parse("qwen")) is None
    assert running_models.cluster_of(parse("qwen", "-n", "models")) is not None
    with pytest.raises(CommandError, match="expected the name of a MoEModel"):
        running_models.cluster_of(parse("--context", "prod"))


@pytest.mark.parametrize("command", ["top", "explain", "chat"])
def test_commands_of_a_cluster_run_kubectl(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "refused: $*" >&2\nexit 1\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["--message", "Hi"] if command == "chat" else []
    assert main([command, "qwen", "-n", "models", *words]) == 1
    assert "refused: --namespace=models get moemodel qwen" in capsys.readouterr().err
