"""`faasmoe prepare` and `faasmoe demo-model`: run `faasmoe_router.checkpoint` as a child."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.store import QuantizationEntry
from faasmoe_contracts.store.quantization import EXPERTS_QUANTIZATIONS, ROUTER_QUANTIZATIONS
from faasmoe_contracts.store.references import STORE_MODES

NO_QUANTIZATION = QuantizationEntry()
COMMAND = (sys.executable, "-m", "faasmoe_router.checkpoint")


def add_commands(commands: Any) -> None:
    """Add `faasmoe prepare` and `faasmoe demo-model`."""
    parser = commands.add_parser(
        "prepare",
        help="convert a checkpoint into a store",
        description="Convert a Hugging Face checkpoint into a store. Weights that the checkpoint\n"
        "holds as they are served stay there, and the store refers to them; others are copied.\n"
        "It is safe to interrupt and to repeat.\n\n"
        "Checkpoints published quantised (fp8, mxfp4, mxfp8, compressed-tensors, GPTQ, AWQ,\n"
        "NVFP4) are read as they are: experts keep codes that the kernels read, the rest is\n"
        "dequantised, and the output says which and what it costs (docs/models.md).",
        epilog="Examples:\n"
        "  faasmoe prepare ./checkpoint ./store\n"
        "  faasmoe prepare hf://Qwen/Qwen1.5-MoE-A2.7B ./store --dtype bfloat16\n"
        "  faasmoe prepare ./checkpoint ./store --quantize int8 --quantize-router int8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="checkpoint: a folder, hf://ORG/NAME or ORG/NAME"
    )
    parser.add_argument("store", metavar="STORE", help="folder to write the store to")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face model")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the stored weights (default: that of the checkpoint)",
    )
    parser.add_argument(
        "--quantize",
        choices=EXPERTS_QUANTIZATIONS,
        default="none",
        help="scheme of the experts' weights, as spec.experts.quantization: int8 is close to "
        "lossless, int4 and mxfp4 are lossy; none keeps the codes of a quantised checkpoint where "
        "kernels read them (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize-router",
        choices=ROUTER_QUANTIZATIONS,
        default="none",
        help="scheme of the router's linear layers, as spec.router.quantization; gates are not "
        "quantised, and with int4 the LM head is int8 (default: %(default)s)",
    )
    parser.add_argument(
        "--mode",
        choices=STORE_MODES,
        default="auto",
        help="as spec.store.mode: auto refers to tensors that lie in the checkpoint as they are "
        "served, so that the checkpoint must stay where it is, and copies the rest; reference does "
        "the same, but fails if experts must be copied; copy copies all (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite a store made from another source"
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
) -> list[str]:
    """Return the command line that converts a checkpoint into a store.

    Args:
        source: a folder, file:///FOLDER, hf://ORG/NAME or ORG/NAME.
        store: folder to write the store to.
        revision: branch, tag or commit; None for the hub's default.
        dtype: dtype of the stored weights; None for that of the checkpoint.
        quantization: what to quantise.
        mode: whether to refer to the checkpoint's tensors or to copy them, see STORE_MODES.
        force: whether to overwrite a store made from another source.
    """
    # The manifest records the source, so a folder needs its absolute path.
    name = Path(source).resolve().as_uri() if Path(source).is_dir() else source
    command = [*COMMAND, "prepare", name, store]
    command += [f"--revision={revision}"] if revision else []
    command += [f"--dtype={dtype}"] if dtype else []
    command += quantization_arguments(quantization)
    command += [f"--mode={mode}"] if mode != "auto" else []
    return command + ["--force"] * force


def quantization_arguments(quantization: QuantizationEntry) -> list[str]:
    """Return the arguments of `prepare` that quantise; none for what is not quantised."""
    parts = {"--quantize": quantization.experts, "--quantize-router": quantization.router}
    return [f"{option}={scheme}" for option, scheme in parts.items() if scheme != "none"]


def _prepare(arguments: argparse.Namespace) -> int:
    return run_in_foreground(
        prepare_command(
            arguments.source,
            arguments.store,
            revision=arguments.revision,
            dtype=arguments.dtype,
            quantization=QuantizationEntry(arguments.quantize, arguments.quantize_router),
            mode=arguments.mode,
            force=arguments.force,
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
