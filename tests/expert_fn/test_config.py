"""Settings are read from the environment, and invalid ones name their variable."""

import re
from pathlib import Path

import pytest

from faasmoe_expert.config import SandboxConfig, SandboxConfigError


def test_every_variable_has_a_default() -> None:
    assert SandboxConfig.from_env({}) == SandboxConfig()


def test_every_variable_is_read() -> None:
    variables = {
        "FAASMOE_SANDBOX_ID": "s7",
        "FAASMOE_HOST": "::",
        "FAASMOE_PORT": "0",
        "FAASMOE_CAPACITY": "3",
        "FAASMOE_DEVICE": "cuda:1",
        "FAASMOE_THREADS": "4",
        "FAASMOE_MEMORY_BYTES": "1000",
        "FAASMOE_TOKEN": "secret",
        "FAASMOE_REQUEST_TIMEOUT_S": "2.5",
        "FAASMOE_IDLE_TIMEOUT_S": "30",
        "FAASMOE_MAX_CONNECTIONS": "12",
        "FAASMOE_DRAIN_S": "0",
        "FAASMOE_SOCKET_DIR": "/run/faasmoe",
        "FAASMOE_MAILBOX": "off",
        "FAASMOE_STORE_PEERS": "http://store:9092,http://[::1]:9093",
        "FAASMOE_CACHE_DIR": "/cache/blocks",
        "FAASMOE_CACHE_BYTES": "5000",
        "FAASMOE_METRICS_MIN_TOKENS": "8",
    }
    assert SandboxConfig.from_env(variables) == SandboxConfig(
        id="s7",
        host="::",
        port=0,
        capacity=3,
        device="cuda:1",
        threads=4,
        memory_bytes=1000,
        token="secret",
        request_timeout_s=2.5,
        idle_timeout_s=30.0,
        max_connections=12,
        drain_s=0.0,
        socket_dir=Path("/run/faasmoe"),
        mailbox=False,
        store_peers=("http://store:9092", "http://[::1]:9093"),
        cache_dir=Path("/cache/blocks"),
        cache_bytes=5000,
        metrics_min_tokens=8,
    )


def test_empty_variables_mean_defaults() -> None:
    variables = {"FAASMOE_PORT": "", "FAASMOE_MEMORY_BYTES": "", "FAASMOE_REQUEST_TIMEOUT_S": ""}
    assert SandboxConfig.from_env(variables) == SandboxConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FAASMOE_PORT", "http"),
        ("FAASMOE_PORT", "-1"),
        ("FAASMOE_PORT", "65536"),
        ("FAASMOE_CAPACITY", "0"),
        ("FAASMOE_CAPACITY", "1.5"),
        ("FAASMOE_THREADS", "0"),
        ("FAASMOE_MEMORY_BYTES", "0"),
        ("FAASMOE_MEMORY_BYTES", "2Gi"),
        ("FAASMOE_DEVICE", "tpu"),
        ("FAASMOE_DEVICE", "cuda:x"),
        ("FAASMOE_REQUEST_TIMEOUT_S", "0"),
        ("FAASMOE_REQUEST_TIMEOUT_S", "nan"),
        ("FAASMOE_REQUEST_TIMEOUT_S", "inf"),
        ("FAASMOE_REQUEST_TIMEOUT_S", "soon"),
        ("FAASMOE_IDLE_TIMEOUT_S", "0"),
        ("FAASMOE_IDLE_TIMEOUT_S", "nan"),
        ("FAASMOE_MAX_CONNECTIONS", "0"),
        ("FAASMOE_MAILBOX", "no"),
        ("FAASMOE_METRICS_MIN_TOKENS", "0"),
        ("FAASMOE_DRAIN_S", "-1"),
        ("FAASMOE_DRAIN_S", "nan"),
        ("FAASMOE_DRAIN_S", "inf"),
    ],
)
def test_rejects_invalid_values_by_variable(name: str, value: str) -> None:
    with pytest.raises(SandboxConfigError, match=f"^{name}: got '?{value}'?, expected "):
        SandboxConfig.from_env({name: value})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FAASMOE_STORE_PEERS": "store:9092"}, "FAASMOE_STORE_PEERS: got 'store:9092'"),
        ({"FAASMOE_STORE_PEERS": "https://store:1"}, "FAASMOE_STORE_PEERS: got 'https"),
        ({"FAASMOE_STORE_PEERS": "http://store"}, "FAASMOE_STORE_PEERS: got 'http://store'"),
        ({"FAASMOE_STORE_PEERS": "http://s:99999"}, "FAASMOE_STORE_PEERS: got"),
        ({"FAASMOE_STORE_PEERS": "http://s:1/x"}, "FAASMOE_STORE_PEERS: got"),
        ({"FAASMOE_STORE_PEERS": "http://store:1"}, "FAASMOE_CACHE_DIR: got none"),
        ({"FAASMOE_CACHE_DIR": "/cache"}, "FAASMOE_CACHE_DIR: got '/cache'"),
    ],
)
def test_peers_and_cache_belong_together(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SandboxConfigError, match=re.escape(message)):
        SandboxConfig.from_env(variables)


def test_with_tls_store_peers_have_it_too() -> None:
    peers = {"FAASMOE_STORE_PEERS": "https://store:9092", "FAASMOE_CACHE_DIR": "/cache"}
    config = SandboxConfig.from_env(
        {**peers, "FAASMOE_TLS_FOLDER": "/tls", "FAASMOE_TLS_NAMESPACE": "llm"}
    )
    assert (config.tls_folder, config.tls_namespace) == (Path("/tls"), "llm")
    with pytest.raises(SandboxConfigError, match=r"got 'https://store:9092', expected http://"):
        SandboxConfig.from_env(peers)
