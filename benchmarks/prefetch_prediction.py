"""Accuracy and benefit of predicting a layer's functions one layer ahead.

`python -m benchmarks.prefetch_prediction CHECKPOINT [--experts-per-function N]` runs the model in
this process. Each layer's gate is applied to the input of the previous MoE block, and the experts
that it selects are compared with those that the layer selects later. Functions that a request of
this length activates in any case (`faasmoe_router.dispatch.routing`) are excluded, because
prediction cannot help there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from faasmoe_operator.cli.formatting import format_table
from faasmoe_router.dispatch.routing import activation_threshold_tokens

ATTACH_S = 0.073  # attach_p50_s of benchmarks/elastic.py
LENGTHS = (1, 2, 4, 8, 16)
N_PROMPTS = 24
TEXT = (
    "A farmer had three sons. The eldest wanted the fields, the second the mill by the river, and "
    "the youngest only asked for the old horse that nobody had ridden for years. In winter, when "
    "the roads were closed, the horse found the way through the snow by itself, and it was the "
    "youngest who brought the doctor from the town in time. "
)


@dataclass(slots=True)
class ObservedLayer:
    """One MoE layer and its input and expert selection in the last forward pass.

    Attributes:
        gate: the router module of the layer.
        rows: input of the experts, [T, H].
        selected: selected experts, [T, k].
    """

    gate: nn.Module
    rows: Tensor | None = None
    selected: Tensor | None = None

    def predict(self, rows: Tensor) -> Tensor:
        """Return the experts [T, k] that the gate selects for rows [T, H]."""
        output: Any = self.gate(rows)
        parts = output if isinstance(output, tuple) else (output,)
        selected: Tensor = next(part for part in parts if not part.is_floating_point())
        return selected


@dataclass(slots=True)
class PrefetchCounts:
    """Counts over all prompts, without the first layer.

    Attributes:
        needed: functions that a layer used.
        predicted: functions that were predicted for it.
        both: functions that were predicted and used.
        runs: prompts.
        waits_without: layers that wait for an activation without prediction.
        waits_with: layers that wait for an activation with prediction.
    """

    needed: int = 0
    predicted: int = 0
    both: int = 0
    runs: int = 0
    waits_without: int = 0
    waits_with: int = 0

    def add(self, needed: Sequence[set[int]], predicted: Sequence[set[int]]) -> None:
        """Add one prompt.

        Args:
            needed: functions that each layer used.
            predicted: functions predicted for each layer.
        """
        pairs = list(zip(needed[1:], predicted[1:], strict=True))
        self.needed += sum(len(n) for n, _ in pairs)
        self.predicted += sum(len(p) for _, p in pairs)
        self.both += sum(len(n & p) for n, p in pairs)
        self.runs += 1
        self.waits_without += sum(map(bool, needed))
        # Nothing is predicted for the first layer; predicted activations overlap with its wait.
        self.waits_with += bool(needed[0]) + sum(bool(n - p) for n, p in pairs)

    def table_row(self, length: int) -> tuple[str, ...]:
        """Return the table row of a prompt length."""
        wait_s = ATTACH_S / self.runs
        return (
            str(length),
            f"{self.needed / self.runs:.1f}",
            f"{self.both / self.predicted:.2f}" if self.predicted else "-",
            f"{self.both / self.needed:.2f}" if self.needed else "-",
            f"{self.waits_without * wait_s:.2f}",
            f"{self.waits_with * wait_s:.2f}",
        )


HEADER = ("TOKENS", "TO PREDICT", "PRECISION", "RECALL", "WAIT WITHOUT, S", "WITH, S")


def observe_layers(model: nn.Module) -> list[ObservedLayer]:
    """Install hooks that record the input and the selected experts of each MoE block."""
    layers: list[ObservedLayer] = []
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        layer = ObservedLayer(getattr(block, "gate", None) or block.get_submodule("router"))

        def record(_: nn.Module, arguments: Any, layer: ObservedLayer = layer) -> None:
            rows, selected = arguments[:2]
            layer.rows, layer.selected = rows.reshape(-1, rows.shape[-1]), selected

        module.register_forward_pre_hook(record)
        layers.append(layer)
    return layers


def measure(
    model: Any, layers: Sequence[ObservedLayer], prompts: Iterator[Tensor], *, block: int
) -> PrefetchCounts:
    """Run prompts [1, n] and count the functions of `block` experts that remain to be predicted."""
    counts, config = PrefetchCounts(), model.config.get_text_config()
    n_experts = getattr(config, "num_experts", None) or config.num_local_experts
    for ids in prompts:
        model(input_ids=ids, use_cache=False)
        shape = [(n_experts, config.num_experts_per_tok)]

        def unlikely_functions(
            selected: Tensor, n: int = ids.shape[1], shape: Any = shape
        ) -> set[int]:
            used = {int(e) // block for e in selected.flatten()}
            sizes = {f: min(block, n_experts - f * block) for f in used}
            return {f for f, size in sizes.items() if activation_threshold_tokens(size, shape) > n}

        needed, predicted = [], [set[int]()]
        for layer in layers:
            assert layer.selected is not None
            needed.append(unlikely_functions(layer.selected))
        for previous, layer in itertools.pairwise(layers):
            assert previous.rows is not None
            predicted.append(unlikely_functions(layer.predict(previous.rows)))
        counts.add(needed, predicted)
    return counts


def draw_prompts(checkpoint: Path, length: int, vocabulary: int) -> Iterator[Tensor]:
    """Yield prompts [1, length]: excerpts of TEXT, or random ids for a byte-level tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT * 4, add_special_tokens=False).input_ids
    if len(ids) > len(TEXT):  # one token per character: not a trained tokenizer
        ids = torch.randint(
            vocabulary, (4096,), generator=torch.Generator().manual_seed(0)
        ).tolist()
    for n in range(N_PROMPTS):
        start = n * 7
        yield torch.tensor([ids[start : start + length]])


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefetch_prediction")
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument(
        "--experts-per-function",
        type=int,
        default=1,
        help="experts of one layer per function (default: %(default)s)",
    )
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype="auto")
    layers, vocabulary = observe_layers(model), model.config.get_text_config().vocab_size
    rows = []
    for length in LENGTHS:
        prompts = draw_prompts(arguments.checkpoint, length, vocabulary)
        counts = measure(model, layers, prompts, block=arguments.experts_per_function)
        rows.append(counts.table_row(length))
    print(f"{len(layers)} layers, functions of {arguments.experts_per_function} experts")
    print(format_table(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
