"""Which functions to keep where memory holds a part of them: policies on a trained model's choices.

`python -m benchmarks.residency CHECKPOINT [--batch 8] [--fraction 0.5]` decodes prompts in this
process, records the experts that each layer picks, and plays policies on that record, with a
function for each expert. Prints the share of rows and of calls that find their function in memory,
and how many functions are loaded per token. Speeds are not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.evaluation.tasks import TaskSizes
from benchmarks.evaluation.workload import rounds_workload
from benchmarks.prefetch_prediction import ObservedLayer, observe_layers

from faasmoe_operator.cli.formatting import format_table

Function = tuple[int, int]
"""Layer and expert."""

Step = Mapping[Function, int]
"""Rows of each function that a decode step calls, in the order of layers."""

IDLE_STEPS = 40  # about 2 s: the control plane evicts nothing that was used since
DECAY = 0.99


@dataclass(slots=True)
class Residency:
    """What was in memory when it was called, and what was loaded."""

    resident: set[Function] = field(default_factory=set)
    rows: int = 0
    rows_found: int = 0
    calls: int = 0
    calls_found: int = 0
    loads: int = 0

    def call(self, function: Function, n_rows: int) -> bool:
        """Count a call; return whether the function is in memory."""
        found = function in self.resident
        self.rows += n_rows
        self.calls += 1
        self.rows_found += found * n_rows
        self.calls_found += found
        return found

    def load(self, function: Function, *, instead_of: Function | None = None) -> None:
        """Load a function, and drop another."""
        if instead_of is not None:
            self.resident.discard(instead_of)
        self.resident.add(function)
        self.loads += 1


def lru_at_each_miss(steps: Sequence[Step], capacity: int) -> Residency:
    """Load every missing function when it is called; drop the least recently used."""
    found, order = Residency(), OrderedDict[Function, None]()
    for step in steps:
        for function, n_rows in step.items():
            if found.call(function, n_rows):
                order.move_to_end(function)
                continue
            oldest = order.popitem(last=False)[0] if len(order) == capacity else None
            found.load(function, instead_of=oldest)
            order[function] = None
    return found


def lru_unless_in_use(steps: Sequence[Step], capacity: int) -> Residency:
    """Load missing functions after a step, instead of those unused for IDLE_STEPS only.

    This is `plan/memory_budget.py`; the router computes what is missing.
    """
    found, last_used = Residency(), dict[Function, int]()
    for now, step in enumerate(steps):
        missing = [f for f, n_rows in step.items() if not found.call(f, n_rows)]
        last_used |= dict.fromkeys(step, now)
        idle = [f for f in found.resident if last_used[f] <= now - IDLE_STEPS]
        idle.sort(key=lambda f: last_used[f])
        for function in missing:
            if len(found.resident) < capacity:
                found.load(function)
            elif idle:
                found.load(function, instead_of=idle.pop(0))
    return found


def lfu(steps: Sequence[Step], capacity: int, *, lead: float) -> Residency:
    """Load after a step what was called `lead` times as often as the rarest in memory."""
    found, counts = Residency(), dict[Function, float]()
    for step in steps:
        missing = [f for f, n_rows in step.items() if not found.call(f, n_rows)]
        counts = {f: DECAY * n for f, n in counts.items()}
        for function, n_rows in step.items():
            counts[function] = counts.get(function, 0.0) + n_rows
        for function in sorted(missing, key=lambda f: -counts[f]):
            if len(found.resident) < capacity:
                found.load(function)
                continue
            rarest = min(found.resident, key=counts.__getitem__)
            if counts[function] <= lead * counts[rarest]:
                break
            found.load(function, instead_of=rarest)
    return found


def best_fixed(steps: Sequence[Step], capacity: int) -> Residency:
    """Keep what is called most over all steps, known from the start."""
    totals: Counter[Function] = Counter()
    for step in steps:
        totals.update(step)
    found = Residency()
    for function, _ in totals.most_common(capacity):
        found.load(function)
    for step in steps:
        for function, n_rows in step.items():
            found.call(function, n_rows)
    return found


POLICIES: Mapping[str, Callable[[Sequence[Step], int], Residency]] = {
    "LRU, load at each miss": lru_at_each_miss,
    "LRU, none in use is evicted (ours)": lru_unless_in_use,
    "LFU, 1.25 times as often": lambda steps, capacity: lfu(steps, capacity, lead=1.25),
    "LFU, twice as often": lambda steps, capacity: lfu(steps, capacity, lead=2.0),
    "best fixed choice": best_fixed,
}


def record_steps(checkpoint: Path, *, batch: int, n_steps: int, rounds: int) -> list[Step]:
    """Decode `rounds` batches for `n_steps` steps; return the functions of each step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    layers = observe_layers(model)
    requests = rounds_workload(rounds, seed=1, sizes=TaskSizes(), tenants=batch).requests
    steps: list[Step] = []
    for number in range(rounds):
        prompts = [r.task.prompt for r in requests if r.number == number]
        decoded = [_decode(model, tokenizer, layers, prompt, n_steps) for prompt in prompts]
        for sequences in zip(*decoded, strict=True):
            rows: Counter[Function] = Counter()
            for functions in sequences:
                rows.update(functions)
            steps.append(dict(sorted(rows.items())))
    return steps


def _decode(
    model: Any, tokenizer: Any, layers: Sequence[ObservedLayer], prompt: str, n_steps: int
) -> list[list[Function]]:
    """Return the functions of each greedy decode step of one sequence."""
    output = model(tokenizer(prompt, return_tensors="pt").input_ids, use_cache=True)
    steps = []
    for _ in range(n_steps):
        ids = output.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]
        output = model(ids, past_key_values=output.past_key_values, use_cache=True)
        functions = []
        for index, layer in enumerate(layers):
            assert layer.selected is not None
            functions += [(index, expert) for expert in layer.selected.flatten().tolist()]
        steps.append(functions)
    return steps


def format_policies(steps: Sequence[Step], *, capacity: int, n_tokens: int) -> str:
    """Return a table with a row per policy."""
    rows = []
    for name, policy in POLICIES.items():
        found = policy(steps, capacity)
        shares = (found.rows_found / found.rows, found.calls_found / found.calls)
        rows.append((name, *(f"{x:.3f}" for x in shares), f"{found.loads / n_tokens:.2f}"))
    return format_table(("POLICY", "ROWS IN MEMORY", "CALLS", "LOADS/TOKEN"), rows)


def main() -> int:
    """Record the steps, play all policies and print their table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residency")
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--steps", type=int, default=24, help="steps of each (default: 24)")
    parser.add_argument("--rounds", type=int, default=3, help="batches (default: 3)")
    parser.add_argument(
        "--fraction", type=float, default=0.5, help="part of the functions in memory (default: 0.5)"
    )
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    steps = record_steps(
        given.checkpoint, batch=given.batch, n_steps=given.steps, rounds=given.rounds
    )
    config = transformers.AutoConfig.from_pretrained(given.checkpoint).get_text_config()
    n_experts = getattr(config, "num_experts", None) or config.num_local_experts
    n_layers = 1 + max(layer for step in steps for layer, _ in step)
    capacity = max(1, int(given.fraction * n_layers * n_experts))
    print(f"{n_layers} layers of {n_experts} experts, {capacity} in memory, batch {given.batch}")
    print(format_policies(steps, capacity=capacity, n_tokens=given.batch * len(steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
