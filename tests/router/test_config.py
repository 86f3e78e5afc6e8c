from pathlib import Path

import pytest

from faasmoe_router.config import RouterConfig
from faasmoe_router.errors import ConfigError

REQUIRED = {"FAASMOE_STORE": "/store", "FAASMOE_TABLE": "/table.json"}


def test_reads_every_variable() -> None:
    config = RouterConfig.from_env(
        {
            **REQUIRED,
            "FAASMOE_MODEL_NAME": "chat",
            "FAASMOE_HOST": "0.0.0.0",
            "FAASMOE_PORT": "80",
            "FAASMOE_DEVICE": "cpu",
            "FAASMOE_MAX_MODEL_LEN": "100",
            "FAASMOE_MAX_NUM_SEQS": "5",
            "FAASMOE_MAX_NUM_BATCHED_TOKENS": "6",
            "FAASMOE_MAX_WAITING": "0",
            "FAASMOE_KV_CACHE_BYTES": "8",
            "FAASMOE_TOKEN": "t",
        }
    )
    assert config == RouterConfig(
        store=Path("/store"),
        table=Path("/table.json"),
        model_name="chat",
        host="0.0.0.0",
        port=80,
        device="cpu",
        max_model_len=100,
        max_num_seqs=5,
        max_num_batched_tokens=6,
        max_waiting=0,
        kv_cache_bytes=8,
        token="t",
    )


def test_defaults_are_those_of_the_class() -> None:
    expected = RouterConfig(store=Path("/store"), table=Path("/table.json"))
    assert RouterConfig.from_env(REQUIRED) == expected
    assert RouterConfig.from_env({**REQUIRED, "FAASMOE_PORT": ""}) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FAASMOE_STORE", ""),
        ("FAASMOE_TABLE", ""),
        ("FAASMOE_PORT", "65536"),
        ("FAASMOE_PORT", "http"),
        ("FAASMOE_DEVICE", "tpu"),
        ("FAASMOE_MAX_MODEL_LEN", "0"),
        ("FAASMOE_MAX_NUM_SEQS", "-1"),
        ("FAASMOE_MAX_NUM_BATCHED_TOKENS", "1.5"),
        ("FAASMOE_MAX_WAITING", "²"),
        ("FAASMOE_KV_CACHE_BYTES", "2Gi"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        RouterConfig.from_env({**REQUIRED, name: value})
