"""Which running models a command is about: those of this user's `faasmoe up`, or of a cluster."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from faasmoe_operator.cli.kubectl_plugin import Kubectl
from faasmoe_operator.cli.runtime_dir import LocalInstance, list_instances
from faasmoe_operator.errors import CommandError

CLUSTER_OPTIONS = ("namespace", "context", "kubeconfig")
KEY_VARIABLE = "FAASMOE_API_KEY"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose among running models."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="name of a running model (default: the only one)"
    )
    parser.add_argument("-f", "--file", type=Path, help="its MoEModel file, to choose by that")
    cluster = parser.add_argument_group(
        "cluster", "With one of these, MODEL is a MoEModel of a cluster, which kubectl reaches."
    )
    for option in CLUSTER_OPTIONS:
        flags = ["-n"] if option == "namespace" else []
        cluster.add_argument(*flags, f"--{option}", help=f"as kubectl's --{option}")


def add_api_key(parser: argparse.ArgumentParser) -> None:
    """Add the key that a model's API asks for."""
    parser.add_argument("--api-key", default="", help=f"API key (default: {KEY_VARIABLE})")


def api_key_of(arguments: argparse.Namespace) -> str:
    """Return the key of the API; empty for none."""
    return arguments.api_key or os.environ.get(KEY_VARIABLE, "")


def cluster_of(arguments: argparse.Namespace) -> Kubectl | None:
    """Return the cluster that is asked for; None if the models are this machine's.

    Raises:
        CommandError: no model is named, or a file is.
    """
    options = [
        f"--{option}={value}"
        for option in CLUSTER_OPTIONS
        if (value := getattr(arguments, option)) is not None
    ]
    if not options:
        return None
    if arguments.model is None or arguments.file is not None:
        raise CommandError("MODEL: expected the name of a MoEModel of the cluster", exit_status=2)
    return Kubectl(options)


def select_instances(
    instances: Sequence[LocalInstance], *, name: str | None, file: Path | None
) -> list[LocalInstance]:
    """Return the running models that a command is about, at least one.

    Args:
        instances: those of this user.
        name: name of the MoEModel, or that which requests give; None for any.
        file: its file; None for any.

    Raises:
        CommandError: there is none.
    """
    found = [
        instance
        for instance in instances
        if name in (None, instance.name, instance.served_name)
        and (file is None or str(file.resolve()) == instance.file)
    ]
    if not instances:
        raise CommandError("faasmoe up: no instance is running")
    if not found:
        names = ", ".join(describe(instance) for instance in instances)
        raise CommandError(f"MODEL: got {name or file}, expected one that runs: {names}")
    return found


def select_instance(name: str | None, file: Path | None) -> LocalInstance:
    """Return the one running model that a command is about; raises CommandError."""
    found = select_instances(list_instances(), name=name, file=file)
    if len(found) > 1:
        names = ", ".join(describe(instance) for instance in found)
        raise CommandError(f"MODEL: several models are running, expected one of {names}")
    return found[0]


def describe(instance: LocalInstance) -> str:
    """Return a model's name and file."""
    return f"{instance.name} ({instance.file})"
