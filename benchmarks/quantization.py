"""What quantising costs and saves: the demo model's outputs, attach times and memory.

`python -m benchmarks.quantization [--quick] [--only quality|functions]`. Compares the demo model
with weights of each scheme, and bf16 arithmetic throughout, with the float32 model: agreement of
the most likely token and KL divergence over passages of this project's documents. Then attaches
functions of 20 experts of Qwen1.5-MoE's geometry to a warm sandbox over HTTP, from the page cache,
and measures the memory of all functions after every expert was used. Writes
benchmarks/out/quantization.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.geometry import CheckpointGeometry
from benchmarks.quantized_functions import measure_functions
from benchmarks.quantized_outputs import measure_outputs
from benchmarks.report import OUT, describe_machine, write_figures

from faasmoe_operator.cli.formatting import format_table

CACHE = Path.home() / ".cache" / "faasmoe-bench"
SCHEMES = ("none", "int8", "int4", "mxfp4")
QWEN = CheckpointGeometry(layers=2, vocabulary=2048)
SMALL = CheckpointGeometry(2, 512, 64, 4, 8, 2, 32, 64)
EXPERTS_PER_FUNCTION = 20
N_TOKENS = 256
OUTPUT_HEADER = ("WEIGHTS", "ROUTER", "TOP-1", "KL", "RELATIVE ERROR")
FUNCTION_HEADER = ("EXPERTS", "MB", "FIRST ATTACH MS", "ATTACH MS", "MEMORY / WEIGHTS")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables and write the figures; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small functions, fewer tokens")
    parser.add_argument("--only", choices=("quality", "functions"), help="one of the parts")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of models and stores")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    arguments = parser.parse_args(argv)
    figures: dict[str, Any] = {"machine": describe_machine()}
    if arguments.only != "quality":
        geometry, block = (SMALL, 3) if arguments.quick else (QWEN, EXPERTS_PER_FUNCTION)
        figures["functions"] = measure_functions(
            geometry, SCHEMES, folder=arguments.cache, experts_per_function=block
        )
        print(format_table(FUNCTION_HEADER, _function_rows(figures["functions"])))
    if arguments.only != "functions":
        n_tokens = 32 if arguments.quick else N_TOKENS
        figures["outputs"] = measure_outputs(SCHEMES, folder=arguments.cache, n_tokens=n_tokens)
        print(format_table(OUTPUT_HEADER, _output_rows(figures["outputs"])))
    print(write_figures("quantization", figures, folder=arguments.out))
    return 0


def _function_rows(functions: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            scheme,
            f"{found['function_bytes'] / 1e6:.1f}",
            found["first_attach_ms"].format(1),
            found["attach_ms"].format(1),
            f"{found['memory_over_weights']:.3f}",
        )
        for scheme, found in functions.items()
    ]


def _output_rows(outputs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            found["weights"],
            found["router"],
            f"{100 * found['top1_agreement']:.1f} %",
            f"{found['kl']:.2e}",
            f"{found['relative_error']:.2e}",
        )
        for found in outputs
    ]


if __name__ == "__main__":
    sys.exit(main())
