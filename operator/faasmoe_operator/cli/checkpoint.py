"""`faasmoe prepare` and `faasmoe demo-model`: run `faasmoe_router.checkpoint` as a child."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.store import QuantizationEntry
from faasmoe_contracts.store.references import STORE_MODES
from faasmoe_operator.cli import model_arguments
from faasmoe_operator.cli.logs import print_progress
from faasmoe_operator.cli.model_source import ModelSource
from faasmoe_operator.cli.store_cache import stores_folder
from faasmoe_operator.errors import CommandError

NO_QUANTIZATION = QuantizationEntry()
COMMAND = (sys.executable, "-m", "faasmoe_router.checkpoint")


def add_commands(commands: Any) -> None:
    """Add `faasmoe prepare` and `faasmoe demo-model`."""
    parser = commands.add_parser(
        "prepare",
        help="convert a checkpoint into a store",
        description="Convert a Hugging Face checkpoint or GGUF file into a store. Weights that\n"
        "a checkpoint holds as they are served stay there, and the store refers to them; others\n"
        "are copied. It is safe to interrupt and to repeat.\n\n"
        "Checkpoints published quantised (fp8, mxfp4, mxfp8, compressed-tensors, GPTQ, AWQ,\n"
        "NVFP4, GGUF) are read as they are: experts keep codes that the kernels read, the rest is\n"
        "dequantised, and the output says which and what it costs (docs/models.md).",
        epilog="Examples:\n"
        "  faasmoe prepare Qwen/Qwen1.5-MoE-A2.7B-Chat   for `faasmoe up` of the same MODEL\n"
        "  faasmoe prepare ./checkpoint ./store\n"
        "  faasmoe prepare ./model-Q8_0.gguf ./store\n"
        "  faasmoe prepare hf://Qwen/Qwen1.5-MoE-A2.7B ./store --dtype bfloat16\n"
        "  faasmoe prepare ./checkpoint ./store --quantize int8 --quantize-router int8\n"
        "  faasmoe prepare ./fine-tune ./stores/tuned --share-with ./stores",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=model_arguments.MODEL_HELP)
    parser.add_argument(
        "store",
        metavar="STORE",
        nargs="?",
        help="folder to write the store to (default: where `faasmoe up MODEL` looks for it)",
    )
    model_arguments.add_store_options(parser.add_argument_group("weights"), "--quantize")
    parser.add_argument(
        "--mode",
        choices=STORE_MODES,
        default="auto",
        help="as spec.store.mode: auto refers to tensors that lie in the checkpoint as they are "
        "served, so that the checkpoint must stay where it is, and copies the rest; reference does "
        "the same, but fails if experts must be copied; copy copies all (default: %(default)s)",
    )
    parser.add_argument(
        "--share-with",
        action="append",
        default=[],
        metavar="PATH",
        help="share files with a store, or with all stores of a folder, where experts or tensors "
        "of the router are equal, as those of fine-tunes are: by hard links, so that the other "
        "store may be removed; repeat it for several (default: without STORE, the stores of "
        "`faasmoe up MODEL`)",
    )
    parser.add_argument(
        "--no-sharing", action="store_true", help="share no files with other stores"
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite a store made from another source"
    )
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="accept weights that are NaN or infinite, which are refused otherwise",
    )
    parser.set_defaults(run=_prepare)
    parser = commands.add_parser(
        "demo-model",
        help="write the demo checkpoint; needs no model hub",
        description="Write a small MoE checkpoint whose experts are slices of the MLPs of\n"
        "SmolLM2-135M-Instruct.",
        epilog="Example:\n"
        "  faasmoe demo-model ./checkpoint && faasmoe prepare ./checkpoint ./store",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder to write the checkpoint to")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="reproduce the logits of SmolLM2-135M-Instruct exactly",
    )
    parser.set_defaults(run=_demo_model)


def prepare_command(
    source: str,
    store: str,
    *,
    revision: str | None,
    dtype: str | None,
    quantization: QuantizationEntry = NO_QUANTIZATION,
    mode: str = "auto",
    force: bool = False,
    allows_nonfinite: bool = False,
    share_with: Iterable[str | Path] = (),
) -> list[str]:
    """Return the command line that converts a checkpoint into a store.

    Args:
        source: a folder, a GGUF file, the file:// URL of either, hf://ORG/NAME or ORG/NAME, or an
            s3://, gs:// or https:// URL.
        store: folder to write the store to.
        revision: branch, tag or commit; None for the hub's default.
        dtype: dtype of the stored weights; None for that of the checkpoint.
        quantization: what to quantise.
        mode: whether to refer to the checkpoint's tensors or to copy them, see STORE_MODES.
        force: whether to overwrite a store made from another source.
        allows_nonfinite: whether to accept weights that are NaN or infinite.
        share_with: stores, or folders of stores, to share files with.
    """
    # The manifest records the source, so a folder or file needs its absolute path.
    name = Path(source).resolve().as_uri() if Path(source).exists() else source
    command = [*COMMAND, "prepare", name, store]
    command += [f"--revision={revision}"] if revision else []
    command += [f"--dtype={dtype}"] if dtype else []
    command += quantization_arguments(quantization)
    command += [f"--mode={mode}"] if mode != "auto" else []
    command += ["--allow-nonfinite"] * allows_nonfinite
    command += [f"--share-with={path}" for path in share_with]
    return command + ["--force"] * force


def quantization_arguments(quantization: QuantizationEntry) -> list[str]:
    """Return the arguments of `prepare` that quantise; none for what is not quantised."""
    parts = {"--quantize": quantization.experts, "--quantize-router": quantization.router}
    return [f"{option}={scheme}" for option, scheme in parts.items() if scheme != "none"]


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.no_sharing and arguments.share_with:
        raise CommandError("expected --share-with or --no-sharing, got both", exit_status=2)
    if arguments.store is not None:
        return _prepare_in(arguments, arguments.model, arguments.store)
    if not arguments.no_sharing:
        arguments.share_with = arguments.share_with or [stores_folder()]
    source = ModelSource.parse(arguments.model)
    cached = model_arguments.cached_store(source, arguments)
    cached.make_parent()
    print_progress(f"store: {cached.path}")
    stamp = cached.stamp()
    if (status := _prepare_in(arguments, source.uri, str(cached.path))) == 0:
        cached.write_stamp(stamp)
    return status


def _prepare_in(arguments: argparse.Namespace, source: str, store: str) -> int:
    return run_in_foreground(
        prepare_command(
            source,
            store,
            revision=arguments.revision,
            dtype=model_arguments.requested_dtype(arguments),
            quantization=model_arguments.requested_quantization(arguments),
            mode=arguments.mode,
            force=arguments.force,
            allows_nonfinite=arguments.allow_nonfinite,
            share_with=arguments.share_with,
        )
    )


def _demo_model(arguments: argparse.Namespace) -> int:
    return run_in_foreground(
        [*COMMAND, "demo-model", arguments.folder, *["--exact"] * arguments.exact]
    )


def run_in_foreground(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> int:
    """Run a command in the foreground and return its exit status.

    The child handles Ctrl-C; SIGTERM is forwarded to it.

    Args:
        command: the command line.
        environment: variables added to this process's environment.

    Returns:
        The exit status, or 128 + N if signal N killed the child.
    """
    full_environment = {**os.environ, PARENT_PID_ENV: str(os.getpid()), **(environment or {})}
    with subprocess.Popen(command, env=full_environment) as child:

        def forward_signal(number: int, _: FrameType | None) -> None:
            child.send_signal(number)

        # The terminal sends SIGINT to the whole process group, but SIGTERM only reaches the parent.
        previous_handlers = [
            signal.signal(signal.SIGINT, lambda _number, _frame: None),
            signal.signal(signal.SIGTERM, forward_signal),
        ]
        try:
            status = child.wait()
        finally:
            signal.signal(signal.SIGINT, previous_handlers[0])
            signal.signal(signal.SIGTERM, previous_handlers[1])
    return status if status >= 0 else 128 - status
