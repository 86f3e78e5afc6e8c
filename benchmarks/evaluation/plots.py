"""Plots of the results as PNG and SVG; the only module that needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

from benchmarks.evaluation.results import ratios
from benchmarks.evaluation.strategies import FULL_MODEL_SHARED
from benchmarks.evaluation.table import Results, strategies
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 130
FIGURE_SIZE = (9.0, 4.2)
FORMATS = ("png", "svg")
RATIO_LABELS = {
    "tokens_per_s": "tokens/s",
    "ttft_p50_s": "first token",
    "tpot_p50_s": "time per token",
    "cpu_s_per_token": "CPU s per token",
    "gb_s_per_token": "GB s per token",
}
Draw = Callable[[Axes], None]
Image = dict[str, bytes]
"""One plot by format."""


def comparison_plots(results: Results) -> dict[str, Image]:
    """Return the plots of a comparison by name; that of ratios only if there is a baseline."""
    has_baseline = FULL_MODEL_SHARED in results and len(strategies(results)) > 1
    return {
        **(
            {"ratios": _render_figure(lambda axes: ratios_to_baseline(axes, results))}
            if has_baseline
            else {}
        ),
        "memory": _render_figure(lambda axes: memory_over_time(axes, results)),
        "ttft": _render_figure(
            lambda axes: latency_distribution(axes, results, "ttfts_s", "time to first token, s")
        ),
        "tpot": _render_figure(
            lambda axes: latency_distribution(axes, results, "tpots_s", "time per token, s")
        ),
    }


def sweep_plots(sweep: Results) -> dict[str, Image]:
    """Return the plots of a sweep over function sizes by name, as in the paper's figure 5."""
    figures = {
        "cpu": ("cpu_s_per_token", "CPU s per token"),
        "memory": ("mean_gb", "memory, GB"),
        "latency": ("tpot_p50_s", "time per token p50, s"),
        "calls": ("calls_per_token", "calls per token"),
    }
    return {
        name: _render_figure(partial(figure_by_size, sweep=sweep, key=key, label=label))
        for name, (key, label) in figures.items()
    }


def growth_plot(rows: Mapping[str, Any]) -> Image:
    """Return how each row grows, relative to its smallest size, beside linear growth."""

    def draw(axes: Axes) -> None:
        largest = 1.0
        for name, row in rows.items():
            sizes = sorted(row["values"], key=int)
            first = row["values"][sizes[0]] or 1e-9
            x = [int(size) / int(sizes[0]) for size in sizes]
            axes.plot(x, [row["values"][s] / first for s in sizes], marker="o", label=name)
            largest = max(largest, x[-1])
        axes.plot([1, largest], [1, largest], color="grey", linestyle=":", label="linear")
        axes.set(xlabel="size, relative", ylabel="cost, relative", xscale="log", yscale="log")
        axes.legend(fontsize="x-small")

    return _render_figure(draw)


def memory_over_time(axes: Axes, results: Results) -> None:
    """Plot the memory of each strategy over time, from its first run."""
    for name in strategies(results):
        samples = results[name]["runs"][0]["details"]["memory"]
        axes.plot([s[0] for s in samples], [s[1] for s in samples], label=results[name]["title"])
    floor = results["about"]["model"]["weights_bytes"] / 1e9
    axes.axhline(floor, color="grey", linestyle=":", label="weights")
    axes.set(xlabel="time, s", ylabel="memory of all processes (PSS), GB", ylim=(0, None))
    axes.legend(fontsize="small")


def ratios_to_baseline(axes: Axes, results: Results) -> None:
    """Plot each strategy's figures over those of one shared full model, as bars."""
    measured = {name: results[name] for name in strategies(results)}
    by_strategy = ratios(measured, baseline=FULL_MODEL_SHARED)
    names = [name for name in strategies(results) if name != FULL_MODEL_SHARED]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        found = [by_strategy[name].get(key, 0.0) for key in RATIO_LABELS]
        places = [index + width * (number - (len(names) - 1) / 2) for index in range(len(found))]
        bars = axes.bar(places, found, width, label=results[name]["title"])
        axes.bar_label(bars, fmt="%.2f", fontsize="x-small")
    axes.axhline(1.0, color="grey", linestyle=":")
    axes.set_xticks(range(len(RATIO_LABELS)), labels=RATIO_LABELS.values())
    axes.set(ylabel=f"over {results[FULL_MODEL_SHARED]['title']}")
    axes.legend(fontsize="small")


def latency_distribution(axes: Axes, results: Results, key: str, label: str) -> None:
    """Plot the cumulative distribution of a latency over the requests of all runs."""
    for name in strategies(results):
        values = sorted(v for run in results[name]["runs"] for v in run["details"][key])
        fractions = [(i + 1) / len(values) for i in range(len(values))]
        axes.step(values, fractions, where="post", label=results[name]["title"])
    axes.set(xlabel=label, ylabel="fraction of requests", xscale="log", ylim=(0, 1.02))
    axes.legend(fontsize="small")


def figure_by_size(axes: Axes, sweep: Results, key: str, label: str) -> None:
    """Plot a figure over the number of experts per function, one line per strategy."""
    sizes = sorted(sweep["sizes"], key=int)
    names = strategies(sweep["sizes"][sizes[0]])
    for name in names:
        results: list[Mapping[str, Any]] = [sweep["sizes"][size][name] for size in sizes]
        low, high = ([r["spread"][key][end] for r in results] for end in (0, 1))
        values, n_experts = [r[key] for r in results], [int(size) for size in sizes]
        (line,) = axes.plot(n_experts, values, marker="o", label=results[0]["title"])
        axes.fill_between(n_experts, low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel="experts per function", ylabel=label, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(size) for size in sizes], labels=sizes)
    axes.legend(fontsize="small")


def _render_figure(draw: Draw) -> Image:
    figure, axes = plt.subplots(figsize=FIGURE_SIZE, layout="constrained")
    try:
        draw(axes)
        axes.grid(visible=True, alpha=0.3)
        return {name: _save(figure, name) for name in FORMATS}
    finally:
        plt.close(figure)


def _save(figure: Figure, format_: str) -> bytes:
    """Return a figure as a file; an SVG says no date, so that equal figures are equal files."""
    image = io.BytesIO()
    metadata = {"Date": None} if format_ == "svg" else None
    with plt.rc_context({"svg.hashsalt": "faasmoe"}):  # the same ids each time
        figure.savefig(image, dpi=DPI, format=format_, metadata=metadata)
    return image.getvalue()
