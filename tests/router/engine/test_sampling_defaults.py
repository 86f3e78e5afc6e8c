import json
from pathlib import Path
from typing import Any

import pytest

from faasmoe_router.engine.sampling_defaults import SamplingDefaults
from faasmoe_router.errors import RouterConfigError


def write(folder: Path, values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_without_a_file_defaults_are_openai_s(tmp_path: Path) -> None:
    assert SamplingDefaults.read(tmp_path) == SamplingDefaults()


def test_reads_what_vllm_reads(tmp_path: Path) -> None:
    values = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.05,
        "max_new_tokens": 100,
        "eos_token_id": [1, 2],
        "do_sample": True,
    }
    read = SamplingDefaults.read(write(tmp_path, values))
    assert read == SamplingDefaults(0.7, 0.8, 20, 0.01, 1.05, 100)


def test_null_is_not_set(tmp_path: Path) -> None:
    assert SamplingDefaults.read(write(tmp_path, {"top_k": None})) == SamplingDefaults()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "got list"),
        ({"temperature": 3}, "temperature: got 3, expected 0 to 2"),
        ({"temperature": "hot"}, "temperature: got 'hot'"),
        ({"top_k": 1.5}, "top_k: got 1.5"),
        ({"top_p": True}, "top_p: got True"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
    ],
)
def test_invalid_value_is_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(RouterConfigError, match=message):
        SamplingDefaults.read(write(tmp_path, values))
