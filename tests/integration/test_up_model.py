"""`faasmoe up MODEL` as a new user runs it: a folder and a hub id, no YAML, to the first token.

The hub is on loopback; the code that downloads is huggingface_hub's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from faasmoe_up import FaasmoeUp, running_up
from hub_server import COMMIT, PROXIES, running_hub
from tiny_chat import save_tiny_chat_model

HUB_ID = "acme/Tiny-MoE"


@dataclass(frozen=True)
class User:
    """A new user: an empty cache, a checkpoint, and a hub that has it.

    Attributes:
        folder: holds the checkpoint `Tiny-MoE`, and is the working directory.
        variables: environment of the user's commands.
    """

    folder: Path
    variables: dict[str, str]

    @property
    def stores(self) -> list[Path]:
        folder = Path(self.variables["XDG_CACHE_HOME"]) / "faasmoe" / "stores"
        return [path.parent for path in sorted(folder.glob("*/manifest.json"))]

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "faasmoe_operator.cli", *arguments],
            env={**os.environ, **self.variables, **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("user") / "Tiny-MoE")


@pytest.fixture
def user(tmp_path: Path, checkpoint: Path) -> Iterator[User]:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").touch()
    with running_hub({HUB_ID: checkpoint, "acme/Nothing": empty}) as hub:
        variables = {
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            **dict.fromkeys(PROXIES, ""),
        }
        yield User(checkpoint.parent, variables)


def first_text(up: FaasmoeUp, model: str, **headers: str) -> str:
    response = httpx.post(
        f"{up.base_url}/v1/chat/completions",
        headers=headers,
        json={
            "model": model,
            "messages": [{"role": "user", "content": "the quick brown"}],
            "max_tokens": 4,
            "temperature": 0,
        },
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_folder_is_served_and_its_store_used_again(user: User, tmp_path: Path) -> None:
    model, log = str(user.folder / "Tiny-MoE"), tmp_path / "log"
    with running_up(model, log, variables=user.variables) as up:
        text = first_text(up, "Tiny-MoE")
        assert text
    (store,) = user.stores
    assert store.name.startswith("tiny-moe-")
    assert f"preparing file://{model} in {store}" in log.read_text()
    manifest = (store / "manifest.json").stat()
    options = ("--served-model-name", "acme/chat", "--max-model-len", "64", "--api-key", "s3cret")
    with running_up(model, log, *options, variables=user.variables) as up:
        assert f"store: {store}" in log.read_text()
        assert "preparing" not in log.read_text()
        authorized = {"Authorization": "Bearer s3cret"}
        assert first_text(up, "acme/chat", **authorized) == text
        assert httpx.get(f"{up.base_url}/v1/models", timeout=60).status_code == 401
        (card,) = httpx.get(f"{up.base_url}/v1/models", headers=authorized, timeout=60).json()[
            "data"
        ]
        assert (card["id"], card["max_model_len"]) == ("acme/chat", 64)
    assert (store / "manifest.json").stat() == manifest


def test_a_hub_id_is_downloaded_and_served(user: User, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--quantization", "int8", "--experts-per-function", "1", "--dtype", "float32")
    host = ("--host", "127.0.0.1")
    with running_up(HUB_ID, log, *options, *host, variables=user.variables) as up:
        assert first_text(up, HUB_ID)
        assert len(up.status()["functions"]) == 8  # 2 layers of 4 experts
    output = log.read_text()
    assert "Fetching" in output  # progress of the download, in whole lines
    assert "preparing: 100%" in output
    assert "\r" not in output
    (store,) = user.stores
    shown = user.run("plan", HUB_ID, *options)
    assert "experts int8" in shown.stdout, shown.stderr
    assert f"hf://{HUB_ID}" in shown.stdout
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["model"]["dtype"] == "float32"
    assert COMMIT in json.dumps(manifest)


def test_prepare_of_the_same_model_is_what_up_serves(user: User, tmp_path: Path) -> None:
    prepared = user.run("prepare", HUB_ID)
    assert prepared.returncode == 0, prepared.stderr
    variables = {**user.variables, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens
    with running_up(HUB_ID, tmp_path / "log", variables=variables) as up:
        assert first_text(up, HUB_ID)


def test_a_changed_checkpoint_is_prepared_again(user: User, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_chat_model(model)
    assert user.run("prepare", str(model)).returncode == 0
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(
        config.replace('"rms_norm_eps"', '"note": 1, "rms_norm_eps"')
    )
    log = tmp_path / "log"
    with running_up(str(model), log, variables=user.variables) as up:
        assert first_text(up, "model")
    assert "has changed since its store was prepared" in log.read_text()
    (store,) = user.stores
    assert '"note"' in (store / "model" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "variables", "texts"),
    [
        pytest.param(
            ["acme/Tiny-MeO"],
            {},
            [
                "hf://",
                "looked for at http://127.0.0.1:",
                "no such repository",
                "check the spelling",
            ],
            id="typo",
        ),
        pytest.param(
            [HUB_ID, "--revision", "v9"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            ["at revision 'v9', looked for at http://127.0.0.1:9", "cannot be reached"],
            id="no-network",
        ),
        pytest.param(
            ["acme/Nothing"],
            {},
            ["'acme/Nothing', which has no config.json and no GGUF file"],
            id="not-a-checkpoint",
        ),
    ],
)
def test_what_the_hub_lacks_is_one_error(
    user: User, arguments: list[str], variables: dict[str, str], texts: list[str]
) -> None:
    ended = user.run("up", *arguments, **variables)
    assert ended.returncode != 0
    (error,) = [line for line in ended.stderr.splitlines() if "error" in line]
    for text in texts:
        assert text in error or text == "hf://"
    assert "Traceback" not in ended.stderr
