"""`faasmoe up FILE.gguf` as a new user runs it: no YAML, to the first token."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from faasmoe_up import FaasmoeUp, running_up
from gguf_models import GGUF_FAMILIES, build_model, file_tensors, write_gguf
from hub_server import PROXIES, running_hub


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = GGUF_FAMILIES["qwen2moe"]
    model = build_model(family)
    path = tmp_path_factory.mktemp("user") / "Tiny-Q8_0.gguf"
    return write_gguf(path, family, model, file_tensors(family, model, "Q8_0").blocks)


OPTIONS = (
    *("--host", "127.0.0.1", "--served-model-name", "tiny", "--max-model-len", "64"),
    *("--quantization", "int4", "--dtype", "float32", "--experts-per-function", "2"),
    *("--api-key", "s3cret"),
)


def first_text(up: FaasmoeUp, model: str, **headers: str) -> str:
    response = httpx.post(
        f"{up.base_url}/v1/completions",
        headers=headers,
        json={"model": model, "prompt": "the quick", "max_tokens": 4, "temperature": 0},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_a_gguf_file_is_served_and_its_store_used_again(file: Path, tmp_path: Path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    texts = []
    for log in (tmp_path / "first.log", tmp_path / "second.log"):
        with running_up(str(file), log, variables=variables) as up:
            texts.append(first_text(up, "Tiny-Q8_0"))
        is_first = log.name == "first.log"
        assert (f"preparing {file.as_uri()} in " in log.read_text()) == is_first
    assert texts[0]
    assert texts[0] == texts[1]


def test_a_gguf_file_takes_the_options_that_people_know(file: Path, tmp_path: Path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    authorized = {"Authorization": "Bearer s3cret"}
    with running_up(str(file), tmp_path / "log", *OPTIONS, variables=variables) as up:
        assert first_text(up, "tiny", **authorized)
        assert httpx.get(f"{up.base_url}/v1/models", timeout=60).status_code == 401
        (card,) = httpx.get(f"{up.base_url}/v1/models", headers=authorized, timeout=60).json()[
            "data"
        ]
        assert (card["id"], card["max_model_len"]) == ("tiny", 64)
        assert len(up.status()["functions"]) == 4  # 2 layers of 4 experts
    (path,) = (tmp_path / "cache").rglob("manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["model"]["dtype"], manifest["quantization"]["experts"]) == ("float32", "int4")


def test_a_file_of_a_hub_repository_is_served(file: Path, tmp_path: Path) -> None:
    log, model = tmp_path / "log", "acme/Tiny-GGUF:Q8_0"
    with running_hub({"acme/Tiny-GGUF": file.parent}) as hub:
        variables = {
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            **dict.fromkeys(PROXIES, ""),
        }
        with running_up(model, log, variables=variables) as up:
            assert first_text(up, model)
            (card,) = httpx.get(f"{up.base_url}/v1/models", timeout=60).json()["data"]
            assert card["id"] == model
    assert f"preparing hf://{model} in " in log.read_text()
