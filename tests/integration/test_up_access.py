"""`faasmoe up` with API keys, CORS and a served model name, and the settings of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from faasmoe_up import UP_COMMAND, FaasmoeUp, running_up
from tiny_chat import save_tiny_chat_model
from tiny_system import moemodel_yaml
from transformers import Qwen2MoeForCausalLM

from faasmoe_operator.cli import main

ORIGIN = "https://chat.example.com"
NAME = "org/tiny"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("access")
    model = save_tiny_chat_model(folder / "model")
    path = folder / "tiny.yaml"
    text = moemodel_yaml(model, router="cpu", experts="cpu")
    path.write_text(text.replace("maxNumSeqs: 4", f"maxNumSeqs: 4, servedModelName: {NAME}"))
    return path


@pytest.fixture(scope="module")
def up(file: Path) -> Iterator[FaasmoeUp]:
    keys = ("--api-key", "sk-one", "--api-key", "sk-two")
    with running_up(file, file.with_name("up.log"), *keys, "--cors-origin", ORIGIN) as running:
        yield running


@pytest.mark.parametrize(("key", "status"), [("sk-one", 200), ("sk-two", 200), ("none", 401)])
def test_only_the_given_keys_are_accepted(up: FaasmoeUp, key: str, status: int) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{up.base_url}/v1/chat/completions"
    response = httpx.post(url, json=CHAT, headers=headers, timeout=60, trust_env=False)
    assert response.status_code == status, response.text


def test_keys_are_not_logged(up: FaasmoeUp) -> None:
    assert "sk-one" not in up.log.read_text()


def test_served_name_is_listed_and_printed(up: FaasmoeUp) -> None:
    headers = {"Authorization": "Bearer sk-one"}
    models = httpx.get(
        f"{up.base_url}/v1/models", headers=headers, trust_env=False, timeout=60
    ).json()
    assert [model["id"] for model in models["data"]] == [NAME]
    assert f"model            {NAME}" in up.log.read_text()


def test_origin_of_the_command_line_is_allowed(up: FaasmoeUp) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    url = f"{up.base_url}/v1/chat/completions"
    response = httpx.options(url, headers=headers, trust_env=False)
    assert response.headers["access-control-allow-origin"] == ORIGIN


def test_api_key_beside_tenants_is_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").mkdir()
    with_tenants = tmp_path / "tenants.yaml"
    with_tenants.write_text(
        file.read_text() + "  tenants: [{name: acme, apiKeysPath: keys}]\n", encoding="utf-8"
    )
    assert UP_COMMAND[-1] == "up"
    assert main(["up", "-f", str(with_tenants), "--api-key", "x"]) == 2
    assert "--api-key" in capsys.readouterr().err


def test_the_kernels_setting_reaches_the_router_and_sandboxes_through_their_zygotes(
    tmp_path: Path,
) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    Qwen2MoeForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    file, log = tmp_path / "tiny.yaml", tmp_path / "log"
    file.write_text(moemodel_yaml(model, router="cpu", experts="cpu"))
    with running_up(file, log, variables={"FAASMOE_KERNELS": "off"}) as up:
        chat = {**CHAT, "model": httpx.get(f"{up.base_url}/v1/models").json()["data"][0]["id"]}
        response = httpx.post(f"{up.base_url}/v1/chat/completions", json=chat, timeout=60)
    assert response.status_code == 200, response.text
    lines = [line for line in log.read_text().splitlines() if "kernels" in line]
    native = [line for line in lines if "native (" in line or "the kernels multiply" in line]
    assert not native
    assert any("sandbox" in line and "switched off by FAASMOE_KERNELS" in line for line in lines)
