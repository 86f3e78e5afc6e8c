"""The whole system on the device: one file, `faasmoe up`, the same answers wherever parts are."""

from pathlib import Path
from typing import Any

from faasmoe_up import running_up
from tiny_system import assert_same_answers, moemodel_yaml, request_completions

DEVICES = {"host": ("cpu", "cpu"), "router": ("cuda", "cpu"), "both": ("cuda", "cuda")}


def test_answers_are_the_same_wherever_router_and_functions_are(
    tiny_model: Path, tmp_path: Path
) -> None:
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, (router, experts) in DEVICES.items():
        folder = tmp_path / name
        folder.mkdir()
        file = folder / "tiny.yaml"
        file.write_text(moemodel_yaml(tiny_model, router=router, experts=experts))
        with running_up(file, folder / "up.log") as up:
            answers[name] = request_completions(up)
            n_here = up.router_metric("local_computations_total")
            assert up.router_metric("function_calls_total") > 10 * n_here
    for name in ("router", "both"):
        assert_same_answers(answers[name], answers["host"])
