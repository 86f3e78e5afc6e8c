"""The whole system with `faasmoe up`: the same answers on every combination of devices."""

from pathlib import Path
from typing import Any

from faasmoe_up import running_up
from tiny_system import assert_same_responses, moemodel_yaml, request_completions

DEVICES = {"host": ("cpu", "cpu"), "router": ("cuda", "cpu"), "both": ("cuda", "cuda")}


def test_answers_do_not_depend_on_devices_of_router_and_functions(
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
        assert_same_responses(answers[name], answers["host"])
