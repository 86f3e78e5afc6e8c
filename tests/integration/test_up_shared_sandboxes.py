"""`faasmoe up` with several models: processes hold functions of all of them, or of one each."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from faasmoe_up import FaasmoeUp, running_up, wait_until
from metric_samples import parse_sample
from tiny_chat import save_tiny_chat_model
from tiny_system import moemodel_yaml

MODELS = ("first", "second", "third")
LEAVING = "third"  # whose functions go to zero at once
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models of one checkpoint, each with a store of its own."""
    folder = tmp_path_factory.mktemp("models")
    model = save_tiny_chat_model(folder / "model")
    files = folder / "served"
    files.mkdir()
    for name in MODELS:
        document = yaml.safe_load(moemodel_yaml(model, router="cpu", experts="cpu"))
        document["metadata"]["name"] = name
        document["spec"]["store"] = {"path": f"stores/{name}", "mode": "copy"}
        experts = {"functionsPerSandbox": 2, "placement": "functions"}
        if name == LEAVING:
            experts["scaling"] = {
                "windowSeconds": 6,
                "panicWindowPercentage": 20,
                "scaleToZeroGracePeriodSeconds": 0,
            }
        document["spec"]["experts"].update(experts)
        (files / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return files


@pytest.fixture(scope="module")
def up(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaasmoeUp]:
    log = tmp_path_factory.mktemp("shared") / "up.log"
    with running_up(served, log) as running:
        yield running


def complete(up: FaasmoeUp, model: str) -> str:
    body = {"model": model, "prompt": "the quick", "max_tokens": 8, "temperature": 0}
    url = f"{up.base_url}/v1/completions"
    response = httpx.post(url, json=body, timeout=TIMEOUT_S, trust_env=False)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def statuses(up: FaasmoeUp) -> dict[str, dict[str, Any]]:
    """Return the state of each model."""
    found = {}
    for file in up.runtime.glob("faasmoe/up-*/control.json"):
        entry = json.loads(file.read_text())
        headers = {"Authorization": f"Bearer {entry['token']}"}
        url = f"{entry['control_url']}/v1/status"
        status = httpx.get(url, headers=headers, timeout=60, trust_env=False).json()
        found[status["model"]] = status
    return found


def pids_of(status: Mapping[str, Any]) -> set[int]:
    return {sandbox["pid"] for sandbox in status["sandboxes"]}


def maps_store(pid: int, served: Path, model: str) -> bool:
    return f"{served}/stores/{model}/" in Path(f"/proc/{pid}/maps").read_text()


def is_whole(status: Mapping[str, Any]) -> bool:
    return all(function["ready"] for function in status["functions"])


def texts_with_functions(up: FaasmoeUp) -> dict[str, str]:
    """Let all models answer until the functions of all are in sandboxes; return their texts."""
    texts = {name: complete(up, name) for name in MODELS}

    def are_whole() -> bool:
        complete(up, LEAVING)
        return all(map(is_whole, statuses(up).values()))

    wait_until(are_whole, timeout_s=TIMEOUT_S, what="all functions to be attached")
    return texts


def test_models_share_processes_and_answer_as_alone(up: FaasmoeUp, served: Path) -> None:
    texts = texts_with_functions(up)
    assert len(set(texts.values())) == 1  # of one checkpoint
    found = statuses(up)
    n_needed = max(len(status["sandboxes"]) for status in found.values())
    shared = set.union(*map(pids_of, found.values()))
    assert len(shared) == n_needed
    assert all(maps_store(pid, served, name) for pid in shared for name in MODELS)
    assert {s["models"] for status in found.values() for s in status["sandboxes"]} == {3}
    memory = sum(s["pss_bytes"] for status in found.values() for s in status["sandboxes"])
    processes = [p for p in up.sandboxes if p.pid in shared]
    assert memory == pytest.approx(sum(p.memory_full_info().pss for p in processes), rel=0.5)
    metrics = httpx.get(f"{_origin(up)}/metrics", timeout=60, trust_env=False).text
    n_processes = parse_sample(metrics, "faasmoe_control_sandbox_processes")
    assert n_processes == len(up.sandboxes)


def _origin(up: FaasmoeUp) -> str:
    file = next(up.runtime.glob("faasmoe/up-*/control.json"))
    return str(json.loads(file.read_text())["control_url"]).partition("/models/")[0]


def test_model_that_leaves_takes_its_weights_out_of_the_processes(
    up: FaasmoeUp, served: Path
) -> None:
    texts_with_functions(up)
    before = pids_of(statuses(up)["first"])

    def has_left() -> bool:
        return not statuses(up)[LEAVING]["sandboxes"]

    wait_until(has_left, timeout_s=TIMEOUT_S, what="the third model to go to zero")
    assert pids_of(statuses(up)["first"]) == before
    for pid in before:
        assert not maps_store(pid, served, LEAVING)
        assert maps_store(pid, served, "first")
    assert complete(up, LEAVING) == complete(up, "first")


def test_every_model_goes_on_when_a_process_is_killed(up: FaasmoeUp) -> None:
    texts = texts_with_functions(up)
    killed = min(pids_of(statuses(up)["first"]))
    with ThreadPoolExecutor(len(MODELS)) as pool:
        answers = [pool.submit(complete, up, name) for name in MODELS * 3]
        next(p for p in up.sandboxes if p.pid == killed).send_signal(signal.SIGKILL)
        assert [a.result(TIMEOUT_S) for a in answers] == [texts[name] for name in MODELS * 3]
    texts_with_functions(up)
    found = statuses(up)
    assert killed not in set.union(*map(pids_of, found.values()))
    assert all(pids_of(found["first"]) & pids_of(found[name]) for name in MODELS)


def test_restarted_control_process_gives_every_model_its_shares_back(up: FaasmoeUp) -> None:
    texts = texts_with_functions(up)
    before = {name: pids_of(status) for name, status in statuses(up).items()}
    control = up.child_running("faasmoe_operator.control")
    assert control is not None
    n_adopted = up.log.read_text().count(" adopted ")
    control.send_signal(signal.SIGKILL)
    control.wait(30)

    def has_adopted() -> bool:
        return up.log.read_text().count(" adopted ") >= n_adopted + len(MODELS)

    wait_until(has_adopted, timeout_s=TIMEOUT_S, what="a new control process")
    assert {name: complete(up, name) for name in MODELS} == texts
    after = {name: pids_of(status) for name, status in statuses(up).items()}
    assert {name: after[name] for name in ("first", "second")} == {
        name: before[name] for name in ("first", "second")
    }


def test_separate_sandboxes_hold_one_model_each(served: Path, tmp_path: Path) -> None:
    own = shutil.copytree(served, tmp_path / "served")
    with running_up(own, tmp_path / "up.log", "--separate-sandboxes") as up:
        assert len({complete(up, name) for name in MODELS}) == 1
        found = statuses(up)
        for name, status in found.items():
            assert status["sandboxes"]
            for sandbox in status["sandboxes"]:
                assert sandbox["models"] == 1
                mapped = {m for m in MODELS if maps_store(sandbox["pid"], own, m)}
                assert mapped <= {name}
        assert sum(len(pids_of(s)) for s in found.values()) == len(
            set.union(*map(pids_of, found.values()))
        )
