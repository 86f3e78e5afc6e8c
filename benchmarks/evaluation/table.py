"""Markdown report of a comparison: setup, medians with minimum and maximum, and ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.evaluation.results import ratios
from benchmarks.evaluation.strategies import FULL_MODEL_SHARED

ABOUT = "about"
NONE = "–"
Results = Mapping[str, Any]

ROWS: Sequence[tuple[str, str, Callable[[float], str]]] = (
    ("tokens_per_s", "tokens/s", lambda x: f"{x:.1f}"),
    ("ttft_p50_s", "first token p50, s", lambda x: f"{x:.3f}"),
    ("ttft_p95_s", "first token p95, s", lambda x: f"{x:.3f}"),
    ("ttft_p99_s", "first token p99, s", lambda x: f"{x:.3f}"),
    ("tpot_p50_s", "per token p50, ms", lambda x: f"{1e3 * x:.1f}"),
    ("tpot_p95_s", "per token p95, ms", lambda x: f"{1e3 * x:.1f}"),
    ("tpot_p99_s", "per token p99, ms", lambda x: f"{1e3 * x:.1f}"),
    ("cpu_s_per_token", "CPU ms per token", lambda x: f"{1e3 * x:.1f}"),
    ("cpu_percent", "CPU %, 100 is one core", lambda x: f"{x:.0f}"),
    ("mean_gb", "memory, mean GB", lambda x: f"{x:.3f}"),
    ("peak_gb", "memory, peak GB", lambda x: f"{x:.3f}"),
    ("gb_s_per_token", "GB s per token", lambda x: f"{x:.4f}"),
    ("calls_per_token", "calls per token", lambda x: f"{x:.2f}"),
    ("wire_bytes_per_token", "KB per token, sent and received", lambda x: f"{x / 1e3:.1f}"),
    ("activations", "activations", lambda x: f"{x:.0f}"),
    ("queued_requests", "requests queued for activation", lambda x: f"{x:.0f}"),
    ("cold_start_p50_s", "cold start p50, s", lambda x: f"{x:.3f}"),
    ("cold_start_p99_s", "cold start p99, s", lambda x: f"{x:.3f}"),
    ("local_computations", "calls computed in the router", lambda x: f"{x:.0f}"),
    ("failures", "failed requests", lambda x: f"{x:.0f}"),
    ("equal_texts", "texts equal to the shared full model's", lambda x: f"{x:.1%}"),
    ("equal_characters", "characters before first difference", lambda x: f"{x:.1%}"),
)
RATIO_ROWS = (
    ("tokens_per_s", "tokens/s"),
    ("ttft_p50_s", "first token p50"),
    ("tpot_p50_s", "per token p50"),
    ("cpu_s_per_token", "CPU per token"),
    ("gb_s_per_token", "GB s per token"),
)


def markdown(results: Results) -> str:
    """Return setup, figures and ratios."""
    return "\n".join(
        [
            describe_setup(results[ABOUT]),
            "",
            figures_table(results),
            "",
            ratios_over_shared(results),
        ]
    )


def strategies(results: Results) -> list[str]:
    """Return the names of the strategies in the results."""
    return [name for name in results if name != ABOUT]


def figures_table(results: Results) -> str:
    """Return the table of figures; rows without any value are omitted."""
    names = strategies(results)
    header = ["", *(results[name]["title"] for name in names)]
    rows = [
        [label, *(_cell(results[name], key, show) for name in names)] for key, label, show in ROWS
    ]
    floor = results[ABOUT]["model"]["weights_bytes"] / 1e9
    relative = [f"{results[name]['mean_gb'] / floor:.2f}" for name in names]
    rows.insert(11, ["mean memory / size of weights", *relative])
    return markdown_table(header, [row for row in rows if set(row[1:]) != {NONE}])


def ratios_over_shared(results: Results) -> str:
    """Return the table of ratios to the shared full model; empty if it did not run."""
    if FULL_MODEL_SHARED not in results:
        return ""
    names = strategies(results)
    by_name = ratios({name: results[name] for name in names}, baseline=FULL_MODEL_SHARED)
    header = ["relative to one shared full model", *(results[name]["title"] for name in names)]
    rows = [
        [label, *(f"{by_name[n][key]:.3f}" if key in by_name[n] else NONE for n in names)]
        for key, label in RATIO_ROWS
    ]
    return markdown_table(header, rows)


def describe_setup(about: Mapping[str, Any]) -> str:
    """Return a list that describes machine, model and workload."""
    machine, model, workload = about["machine"], about["model"], about["workload"]
    full = about["full_model"]["experts_implementation"]
    return "\n".join(
        [
            f"- machine: {machine['cores']} cores of {machine['cpu']}, "
            f"{machine['memory_bytes'] / (1 << 30):.0f} GiB, "
            f"load {machine['load_1min_at_start']:.1f} at the start, {machine['date']}, "
            f"torch {machine['versions']['torch']}, "
            f"transformers {machine['versions']['transformers']}",
            f"- model: {model['name']}, {model['architecture']}, {model['dtype']}, "
            f"{model['weights_bytes'] / 1e9:.3f} GB of weights, "
            f"{model['moe_layers']} MoE layers of {model['experts']} experts, "
            f"{model['experts_per_function']} experts per function, "
            f"up to {model['functions_per_sandbox']} functions per sandbox",
            f"- workload: {workload['name']} (seed {about['seed']}, digest {workload['digest']}), "
            f"{workload['tenants']} tenants, {workload['requests']} requests, "
            f"{workload['tokens']} tokens",
            f"- experts implementation of full models: {full['alone']} per tenant, "
            f"{full['shared']} shared",
        ]
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(result: Mapping[str, Any], key: str, show: Callable[[float], str]) -> str:
    value, spread = result[key], result["spread"].get(key)
    if value is None:
        return NONE
    varies = spread is not None and len(result["runs"]) > 1 and show(spread[0]) != show(spread[1])
    return f"{show(value)} ({show(spread[0])}..{show(spread[1])})" if varies else show(value)
