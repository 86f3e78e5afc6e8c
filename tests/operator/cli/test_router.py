from collections.abc import Callable
from pathlib import Path

import pytest

from faasmoe_operator.cli.router import Endpoint, environment
from faasmoe_operator.control.local_model import LocalModel

WriteModel = Callable[..., Path]
ENDPOINT = Endpoint("127.0.0.1", 8000)


def environment_of(file: Path, **arguments: Path) -> dict[str, str]:
    deployment = LocalModel.load(file)
    return environment(deployment, ENDPOINT, control_url="http://c", token="t", **arguments)


def test_says_all_that_the_spec_says(write_model: WriteModel) -> None:
    limits = "maxModelLen: 2048, maxNumSeqs: 8, maxNumBatchedTokens: 64, maxWaiting: 0"
    file = write_model(f"router: {{device: cpu, {limits}, kvCacheMemory: 1.5Gi}}")
    found = environment_of(file, tenants_file=Path("/run/tenants.json"))
    assert found["FAASMOE_MODEL_NAME"] == "tiny"
    assert found["FAASMOE_DEVICE"] == "cpu"
    assert found["FAASMOE_MAX_MODEL_LEN"] == "2048"
    assert found["FAASMOE_MAX_NUM_SEQS"] == "8"
    assert found["FAASMOE_MAX_NUM_BATCHED_TOKENS"] == "64"
    assert found["FAASMOE_MAX_WAITING"] == "0"
    assert found["FAASMOE_KV_CACHE_BYTES"] == str(3 << 29)
    assert found["FAASMOE_TENANTS_FILE"] == "/run/tenants.json"


def test_leaves_to_the_router_what_the_spec_leaves_out(write_model: WriteModel) -> None:
    found = environment_of(write_model())
    for name in ("MAX_MODEL_LEN", "KV_CACHE_BYTES", "TENANTS_FILE"):
        assert f"FAASMOE_{name}" not in found


def test_takes_the_variables_of_the_spec_before_its_own_environment(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/outer")
    found = environment_of(write_model("router: {env: [{name: HF_HOME, value: /inner}]}"))
    assert found["HF_HOME"] == "/inner"


@pytest.mark.parametrize(
    ("experts", "placement"),
    [
        ("experts: {}", "auto"),
        ("experts: {placement: auto}", "auto"),
        ("experts: {placement: functions}", "functions"),
    ],
)
def test_the_router_is_told_where_experts_may_be_computed(
    experts: str, placement: str, write_model: WriteModel
) -> None:
    assert environment_of(write_model(experts))["FAASMOE_PLACEMENT"] == placement
