from pathlib import Path

import pytest

from faasmoe_router.config import RouterConfig, VllmArguments, open_tls_folder
from faasmoe_router.errors import RouterConfigError

REQUIRED = {"FAASMOE_STORE": "/store", "FAASMOE_TABLE": "/table.json"}


def test_reads_every_variable() -> None:
    config = RouterConfig.from_env(
        {
            **REQUIRED,
            "FAASMOE_MODEL_NAME": "chat",
            "FAASMOE_HOST": "0.0.0.0",
            "FAASMOE_PORT": "80",
            "FAASMOE_DEVICE": "cpu",
            "FAASMOE_DTYPE": "float16",
            "FAASMOE_COMPUTE": "modules",
            "FAASMOE_MAX_MODEL_LEN": "100",
            "FAASMOE_MAX_NUM_SEQS": "5",
            "FAASMOE_MAX_NUM_BATCHED_TOKENS": "6",
            "FAASMOE_MAX_WAITING": "0",
            "FAASMOE_KV_CACHE_BYTES": "8",
            "FAASMOE_TOKEN": "t",
            "FAASMOE_ACTIVATION_TIMEOUT": "12.5",
            "FAASMOE_CALL_QUEUE_TIMEOUT": "0",
            "FAASMOE_MAX_ACTIVATION_QUEUE_REQUESTS": "9",
            "FAASMOE_MAX_ACTIVATION_QUEUE_BYTES": "10",
            "FAASMOE_TENANTS_FILE": "/tenants.json",
            "FAASMOE_STATE_DIR": "/state",
            "FAASMOE_SOCKET_DIR": "/run/sockets",
            "FAASMOE_PLACEMENT": "auto",
            "FAASMOE_MAILBOX": "off",
            "FAASMOE_ROUTER_REPLICAS": "3",
            "FAASMOE_GENERATION_CONFIG": "none",
            "FAASMOE_CORS_ORIGINS": "https://a.example, http://localhost:3000",
        }
    )
    assert config == RouterConfig(
        store=Path("/store"),
        table=Path("/table.json"),
        model_name="chat",
        host="0.0.0.0",
        port=80,
        device="cpu",
        dtype="float16",
        compute="modules",
        max_model_len=100,
        max_num_seqs=5,
        max_num_batched_tokens=6,
        max_waiting=0,
        kv_cache_bytes=8,
        token="t",
        activation_timeout_s=12.5,
        call_queue_timeout_s=0.0,
        max_activation_queue_requests=9,
        max_activation_queue_bytes=10,
        tenants_file=Path("/tenants.json"),
        state_dir=Path("/state"),
        socket_dir=Path("/run/sockets"),
        placement="auto",
        mailbox="off",
        router_replicas=3,
        generation_config="none",
        cors_origins=("https://a.example", "http://localhost:3000"),
    )


def test_unset_and_empty_variables_use_the_defaults() -> None:
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
        ("FAASMOE_DTYPE", "int8"),
        ("FAASMOE_COMPUTE", "native"),
        ("FAASMOE_MAX_MODEL_LEN", "0"),
        ("FAASMOE_MAX_NUM_SEQS", "-1"),
        ("FAASMOE_MAX_NUM_BATCHED_TOKENS", "1.5"),
        ("FAASMOE_MAX_WAITING", "²"),
        ("FAASMOE_CORS_ORIGINS", "a.example"),
        ("FAASMOE_GENERATION_CONFIG", "vllm"),
        ("FAASMOE_KV_CACHE_BYTES", "2Gi"),
        ("FAASMOE_ACTIVATION_TIMEOUT", "0"),
        ("FAASMOE_ACTIVATION_TIMEOUT", "nan"),
        ("FAASMOE_CALL_QUEUE_TIMEOUT", "2s"),
        ("FAASMOE_CALL_QUEUE_TIMEOUT", "-1"),
        ("FAASMOE_MAX_ACTIVATION_QUEUE_REQUESTS", "many"),
        ("FAASMOE_MAX_ACTIVATION_QUEUE_BYTES", "64Mi"),
        ("FAASMOE_PLACEMENT", "router"),
        ("FAASMOE_MAILBOX", "false"),
        ("FAASMOE_NICENESS", "-1"),
        ("FAASMOE_NICENESS", "20"),
    ],
)
def test_error_names_the_invalid_variable(name: str, value: str) -> None:
    with pytest.raises(RouterConfigError, match=f"^{name}: "):
        RouterConfig.from_env({**REQUIRED, name: value})


def test_control_url_replaces_the_table_file() -> None:
    config = RouterConfig.from_env(
        {"FAASMOE_STORE": "/store", "FAASMOE_CONTROL_URL": "http://127.0.0.1:8080/"}
    )
    assert config.table is None
    assert config.control_url == "http://127.0.0.1:8080"


def test_rejects_both_control_url_and_table_file() -> None:
    with pytest.raises(RouterConfigError, match=r"^FAASMOE_CONTROL_URL: got it and FAASMOE_TABLE"):
        RouterConfig.from_env({**REQUIRED, "FAASMOE_CONTROL_URL": "http://h:1"})


@pytest.mark.parametrize("url", ["h:80", "ftp://h", "http://", "http://h:port", "http://h:0"])
def test_rejects_invalid_control_urls(url: str) -> None:
    with pytest.raises(RouterConfigError, match=r"^FAASMOE_CONTROL_URL: got .*, expected a URL"):
        RouterConfig.from_env({"FAASMOE_STORE": "/store", "FAASMOE_CONTROL_URL": url})


def test_the_token_is_not_in_the_repr() -> None:
    assert "secret" not in repr(RouterConfig.from_env({**REQUIRED, "FAASMOE_TOKEN": "secret"}))


def test_reads_the_arguments_of_vllm() -> None:
    arguments = '{"enforce_eager": false, "tool_call_parser": "hermes"}'
    config = RouterConfig.from_env({**REQUIRED, "FAASMOE_ENGINE_ARGS": arguments})
    assert config.engine == "auto"
    assert config.engine_args == VllmArguments(enforce_eager=False, tool_call_parser="hermes")


@pytest.mark.parametrize(
    ("arguments", "engine", "message"),
    [
        ('{"load_format": "auto"}', "vllm", "load_format: Extra inputs"),
        ('{"max_logprobs": "5"}', "vllm", "max_logprobs: Input should be a valid integer"),
        ("[]", "vllm", "FAASMOE_ENGINE_ARGS: got '\\[\\]', expected a JSON object"),
        ("{", "vllm", "FAASMOE_ENGINE_ARGS: got '{', expected a JSON object"),
        (
            '{"max_logprobs": 5}',
            "transformers",
            "nothing with FAASMOE_ENGINE=transformers",
        ),
    ],
)
def test_rejects_other_arguments_of_vllm(arguments: str, engine: str, message: str) -> None:
    variables = {"FAASMOE_ENGINE": engine, "FAASMOE_ENGINE_ARGS": arguments}
    with pytest.raises(RouterConfigError, match=message):
        RouterConfig.from_env({**REQUIRED, **variables})


def test_with_tls_the_control_plane_has_it_too() -> None:
    env = {"FAASMOE_STORE": "/store", "FAASMOE_TLS_FOLDER": "/tls", "FAASMOE_TLS_NAMESPACE": "llm"}
    config = RouterConfig.from_env({**env, "FAASMOE_CONTROL_URL": "https://h:1"})
    assert (config.tls_folder, config.tls_namespace) == (Path("/tls"), "llm")
    with pytest.raises(RouterConfigError, match=r"^FAASMOE_CONTROL_URL: got http://h:1, expected"):
        RouterConfig.from_env({**env, "FAASMOE_CONTROL_URL": "http://h:1"})
    with pytest.raises(RouterConfigError, match=r"^FAASMOE_TLS_NAMESPACE: got 'a.b'"):
        RouterConfig.from_env({**REQUIRED, "FAASMOE_TLS_NAMESPACE": "a.b"})


def test_an_unusable_tls_folder_is_named(tmp_path: Path) -> None:
    config = RouterConfig.from_env({**REQUIRED, "FAASMOE_TLS_FOLDER": str(tmp_path)})
    with pytest.raises(RouterConfigError, match=r"^FAASMOE_TLS_FOLDER: "):
        open_tls_folder(config)
