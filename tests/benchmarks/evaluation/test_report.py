import json
import re
from pathlib import Path
from typing import Any

import evaluation_results as figures
import pytest
from benchmarks.evaluation import plots, report, sweep_table, table
from benchmarks.evaluation.__main__ import main
from benchmarks.evaluation.report import render_html_page


def _row(markdown: str, label: str) -> list[str]:
    """Return the cells of the first row with a label."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture
def comparison() -> dict[str, Any]:
    """A full model, and functions with half its speed and a quarter of its memory."""
    full = tuple(figures.make_run(size_bytes=8 * 10**9) for _ in range(2))
    ours = tuple(figures.make_run(speed=speed) for speed in (0.5, 0.4))
    return figures.make_comparison(full_model_shared=full, functions_shared=ours)


def test_table_shows_medians_with_minimum_and_maximum(comparison: dict[str, Any]) -> None:
    text = table.markdown(comparison)
    assert _row(text, "tokens/s") == ["2.0", "0.9 (0.8..1.0)"]
    assert _row(text, "memory, mean GB") == ["8.000", "2.000"]
    assert _row(text, "mean memory / size of weights") == ["4.00", "1.00"]
    assert _row(text, "failed requests") == ["0", "0"]


def test_table_omits_rows_without_values(comparison: dict[str, Any]) -> None:
    assert "cold start p50" not in table.markdown(comparison)


def test_report_describes_machine_model_and_workload(comparison: dict[str, Any]) -> None:
    text = table.markdown(comparison)
    for part in ("2 cores of some <processor>", "demo, Qwen2MoeForCausalLM", "digest abc"):
        assert part in text


def test_no_ratios_without_baseline() -> None:
    assert (
        table.ratios_over_shared(figures.make_comparison(functions_shared=(figures.make_run(),)))
        == ""
    )


def test_html_page_is_self_contained(comparison: dict[str, Any]) -> None:
    text = render_html_page("a title", table.markdown(comparison), {"memory": b"image"})
    assert re.findall(r'(?:src|href)="([^"]{5})', text) == ["data:"]
    assert "some &lt;processor&gt;" in text
    assert text.count("<table>") == 2


def test_report_is_rendered_from_figures(
    comparison: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "paper.json").write_text(json.dumps(comparison))
    assert main(["report", str(tmp_path / "paper.json")]) == 0
    assert (tmp_path / "paper.md").read_text().strip() in capsys.readouterr().out
    for name in ("memory", "ttft", "tpot", "ratios"):
        assert (tmp_path / f"paper-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"paper-{name}.svg").read_text()
    assert (tmp_path / "paper.html").read_text().count("data:image/png") == 4


def test_the_same_figures_give_the_same_svg(comparison: dict[str, Any]) -> None:
    first, second = (plots.comparison_plots(comparison)["ratios"]["svg"] for _ in range(2))
    assert first == second
    assert b"<path" in first


def test_no_plot_of_ratios_without_a_baseline() -> None:
    alone = figures.make_comparison(functions_shared=(figures.make_run(),))
    assert "ratios" not in plots.comparison_plots(alone)


def test_sweep_report_has_plots_and_recommendation(tmp_path: Path) -> None:
    sweep = _sweep({1: (1.0, 4.0), 20: (2.0, 2.0)})
    report.write("sweep", sweep, folder=tmp_path)
    images = {path.name for path in tmp_path.glob("*.png")}
    assert images == {f"sweep-{name}.png" for name in ("cpu", "memory", "latency", "calls")}
    assert "recommended: 20 experts" in (tmp_path / "sweep.md").read_text()


def _sweep(sizes: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """Return the figures of a sweep with the given speed and memory in GB by size."""
    by_size: dict[str, Any] = {}
    for size, (speed, gb) in sizes.items():
        run = figures.make_run(speed=speed, cpu_s=10 / speed, size_bytes=int(gb * 1e9))
        by_size[str(size)] = figures.make_comparison(functions_shared=(run,))
        by_size[str(size)].pop("about")
    return {"about": figures.ABOUT, "sizes": by_size}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param(
            {1: (1, 9), 6: (2, 2), 20: (2, 2), 60: (2, 2)}, 6, id="the-smallest-of-equals"
        ),
        pytest.param({6: (1.97, 2.05), 20: (2, 2)}, 6, id="within-a-twentieth"),
        pytest.param({6: (1.8, 2), 20: (2, 2)}, 20, id="too-slow"),
        pytest.param({6: (2, 2.3), 20: (2, 2)}, 20, id="too-large"),
        pytest.param({6: (1, 2), 20: (1.9, 2.2), 60: (2, 4)}, 20, id="a-compromise"),
    ],
)
def test_recommends_size(sizes: dict[int, tuple[float, float]], expected: int) -> None:
    assert sweep_table.recommended_size(_sweep(sizes)) == expected
