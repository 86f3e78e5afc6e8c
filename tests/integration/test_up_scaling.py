"""`faasmoe up` with a memory limit over two models, and with two routers of one model."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from faasmoe_up import FaasmoeUp, running_up, wait_until
from tiny_chat import save_tiny_chat_model
from tiny_system import moemodel_yaml

TIMEOUT_S = 180.0
ONE_ROUTER_BYTES = 190_000_000  # a tiny model's has 110 to 140 MB


def write_model(folder: Path, name: str, **scaling: Any) -> Path:
    model = folder / "model"
    if not model.is_dir():
        save_tiny_chat_model(model)
    document = yaml.safe_load(moemodel_yaml(model, router="cpu", experts="cpu"))
    document["metadata"]["name"] = name
    document["spec"]["store"]["path"] = f"../stores/{name}"
    document["spec"]["router"]["scaling"] = scaling
    file = folder / "models" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(document))
    return file


def complete(up: FaasmoeUp, model: str, **fields: Any) -> str:
    body = {"model": model, "prompt": "the quick", "max_tokens": 4, "temperature": 0, **fields}
    response = httpx.post(f"{up.base_url}/v1/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def routers(up: FaasmoeUp) -> list[psutil.Process]:
    zygote = up.child_running("faasmoe_router.zygote")
    return [] if zygote is None else zygote.children()


def test_models_take_turns_within_the_memory_limit(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_model(tmp_path, name, idleSeconds=3600)
    options = ("--memory", str(ONE_ROUTER_BYTES))
    with running_up(tmp_path / "models", tmp_path / "up.log", *options) as up:
        texts: Mapping[str, set[str]] = {"first": set(), "second": set()}
        for _ in range(2):
            for name, seen in texts.items():
                seen.add(complete(up, name))
                assert len(routers(up)) == 1
        assert {len(seen) for seen in texts.values()} == {1}
        page = httpx.get(f"{up.base_url}/ui/models", trust_env=False, timeout=60)
        assert page.json() == {"models": ["first", "second"]}


def test_many_requests_start_a_second_router_which_ends_without_them(tmp_path: Path) -> None:
    file = write_model(tmp_path, "tiny", maxReplicas=2, targetConcurrency=1, idleSeconds=10)
    with running_up(file, tmp_path / "up.log") as up, ThreadPoolExecutor(8) as pool:
        expected = complete(up, "tiny", max_tokens=200, ignore_eos=True)

        def complete_until_two(_: int) -> set[str]:
            seen = set()
            while len(routers(up)) < 2:
                seen.add(complete(up, "tiny", max_tokens=200, ignore_eos=True))
            return seen | {complete(up, "tiny", max_tokens=200, ignore_eos=True)}

        assert set().union(*pool.map(complete_until_two, range(8))) == {expected}
        wait_until(lambda: len(routers(up)) == 0, timeout_s=TIMEOUT_S, what="no router")
        assert complete(up, "tiny", max_tokens=200, ignore_eos=True) == expected
