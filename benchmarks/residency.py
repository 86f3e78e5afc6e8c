"""Which functions to keep where memory holds a part of them: policies on a trained model's choices.

`python -m benchmarks.residency CHECKPOINT [--batch 8] [--fraction 0.5]` decodes prompts in this
process, records the experts that each layer picks, and plays policies on that record, with a
function for each expert. Prints the share of rows and of calls that find their function in memory,
and how many functions are loaded per token. With `--prompts`, each prompt is a step of its own,
which uses nearly all experts. Speeds are not measured.
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

from faasmoe_kernels import load
from faasmoe_kernels.expert_residency import ExpertResidency, ExpertUse
from faasmoe_operator.cli.formatting import format_table

Function = tuple[int, int]
"""Layer and expert."""

Step = Mapping[Function, int]
"""Rows of each function that a decode step calls, in the order of layers."""

IDLE_STEPS = 40  # about 2 s: the control plane evicts nothing that was used since
DECAY = 0.99
EXPERT_BYTES = 8 << 20
CALL_S = 0.01


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


def kernel_residency(steps: Sequence[Step], capacity: int) -> Residency:
    """Play `expert_residency.h` in memory whose kernel evicts what was used least recently.

    The policy is not told the capacity: it finds it by what is read again.
    """
    found, policy = Residency(), ExpertResidency(load())
    memory = _LruMemory(found, capacity)
    now_s = 0.0
    for step in steps:
        for layer in sorted({layer for layer, _ in step}):
            functions = [f for f in step if f[0] == layer]
            uses = [ExpertUse(_number(f), layer, EXPERT_BYTES) for f in functions]
            now_s += CALL_S
            plan = policy.begin(now_s, uses)
            memory.drop(plan.evicted)
            expected = [f for f in functions if _number(f) not in plan.read]
            n_missed = sum(function not in found.resident for function in expected)
            for function in functions:
                found.call(function, step[function])
                memory.use(function)
                if _number(function) in plan.dropped:
                    memory.drop([_number(function)])
            memory.drop(policy.finish(now_s, n_missed * EXPERT_BYTES))
    return found


def _number(function: Function) -> int:
    return function[0] << 32 | function[1]


class _LruMemory:
    """Memory for `capacity` functions, which drops the least recently used one for another."""

    def __init__(self, found: Residency, capacity: int) -> None:
        self._found = found
        self._capacity = capacity
        self._order = OrderedDict[Function, None]()

    def use(self, function: Function) -> None:
        """Load a function unless it is there."""
        if function in self._order:
            self._order.move_to_end(function)
            return
        is_full = len(self._order) == self._capacity
        self._found.load(
            function, instead_of=self._order.popitem(last=False)[0] if is_full else None
        )
        self._order[function] = None

    def drop(self, numbers: Sequence[int]) -> None:
        """Drop functions that are there."""
        for number in numbers:
            function = (number >> 32, number & 0xFFFFFFFF)
            if function in self._order:
                del self._order[function]
                self._found.resident.discard(function)


POLICIES: Mapping[str, Callable[[Sequence[Step], int], Residency]] = {
    "LRU, load at each miss": lru_at_each_miss,
    "LRU, none in use is evicted (experts.memory)": lru_unless_in_use,
    "LFU with decay, rare ones dropped (page cache)": kernel_residency,
    "LFU, 1.25 times as often": lambda steps, capacity: lfu(steps, capacity, lead=1.25),
    "LFU, twice as often": lambda steps, capacity: lfu(steps, capacity, lead=2.0),
    "best fixed choice": best_fixed,
}


def record_steps(
    checkpoint: Path, *, batch: int, n_steps: int, rounds: int, has_prompts: bool = False
) -> list[Step]:
    """Decode `rounds` batches for `n_steps` steps; return the functions of each step.

    With `has_prompts`, a prompt is a step after each `n_steps / batch` steps of the others.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    layers = observe_layers(model)
    requests = rounds_workload(rounds, seed=1, sizes=TaskSizes(), tenants=batch).requests
    steps: list[Step] = []
    for number in range(rounds):
        prompts = [r.task.prompt for r in requests if r.number == number]
        decoded = [_decode(model, tokenizer, layers, prompt, n_steps) for prompt in prompts]
        prompt_steps = [Counter(sequence[0]) for sequence in decoded] if has_prompts else []
        for number_of_step, sequences in enumerate(zip(*(d[1:] for d in decoded), strict=True)):
            if prompt_steps and number_of_step % max(1, n_steps // batch) == 0:
                steps.append(dict(sorted(prompt_steps.pop().items())))
            rows: Counter[Function] = Counter()
            for functions in sequences:
                rows.update(functions)
            steps.append(dict(sorted(rows.items())))
    return steps


def _decode(
    model: Any, tokenizer: Any, layers: Sequence[ObservedLayer], prompt: str, n_steps: int
) -> list[list[Function]]:
    """Return the functions of a prompt, and of each greedy decode step after it."""
    output = model(tokenizer(prompt, return_tensors="pt").input_ids, use_cache=True)
    steps = [_selected(layers)]
    for _ in range(n_steps):
        ids = output.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]
        output = model(ids, past_key_values=output.past_key_values, use_cache=True)
        steps.append(_selected(layers))
    return steps


def _selected(layers: Sequence[ObservedLayer]) -> list[Function]:
    """Return the functions of the pairs of the last step."""
    functions: list[Function] = []
    for index, layer in enumerate(layers):
        assert layer.selected is not None
        functions += [(index, expert) for expert in layer.selected.flatten().tolist()]
    return functions


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
    parser.add_argument("--prompts", action="store_true", help="let prompts be steps, too")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    steps = record_steps(
        given.checkpoint,
        batch=given.batch,
        n_steps=given.steps,
        rounds=given.rounds,
        has_prompts=given.prompts,
    )
    config = transformers.AutoConfig.from_pretrained(given.checkpoint).get_text_config()
    n_experts = getattr(config, "num_experts", None) or config.num_local_experts
    n_layers = 1 + max(layer for step in steps for layer, _ in step)
    capacity = max(1, int(given.fraction * n_layers * n_experts))
    print(f"{n_layers} layers of {n_experts} experts, {capacity} in memory, batch {given.batch}")
    n_tokens = given.batch * given.steps * given.rounds
    print(format_policies(steps, capacity=capacity, n_tokens=n_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
