import asyncio
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from faasmoe_operator.cli.router import (
    Endpoint,
    environment,
    wait_until_healthy,
    zygote_command,
    zygote_key,
)
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import CommandError

WriteModel = Callable[..., Path]
ENDPOINT = Endpoint("127.0.0.1", 8000)


def router_environment(file: Path, **arguments: Any) -> dict[str, str]:
    deployment = LocalModel.load(file)
    return environment(deployment, ENDPOINT, control_url="http://c", token="t", **arguments)


def test_environment_contains_settings_of_spec(write_model: WriteModel) -> None:
    limits = "maxModelLen: 2048, maxNumSeqs: 8, maxNumBatchedTokens: 64, maxWaiting: 0"
    router = f"device: cpu, dtype: float32, compute: modules, {limits}, kvCacheMemory: 1.5Gi"
    file = write_model(f"router: {{{router}}}")
    variables = router_environment(file, tenants_file=Path("/run/tenants.json"))
    assert variables["FAASMOE_MODEL_NAME"] == "tiny"
    assert variables["FAASMOE_DEVICE"] == "cpu"
    assert variables["FAASMOE_DTYPE"] == "float32"
    assert variables["FAASMOE_COMPUTE"] == "modules"
    assert variables["FAASMOE_MAX_MODEL_LEN"] == "2048"
    assert variables["FAASMOE_MAX_NUM_SEQS"] == "8"
    assert variables["FAASMOE_MAX_NUM_BATCHED_TOKENS"] == "64"
    assert variables["FAASMOE_MAX_WAITING"] == "0"
    assert variables["FAASMOE_KV_CACHE_BYTES"] == str(3 << 29)
    assert variables["FAASMOE_TENANTS_FILE"] == "/run/tenants.json"


def test_arguments_of_vllm_are_passed_on_under_its_names(write_model: WriteModel) -> None:
    arguments = "{enforceEager: false, toolCallParser: hermes}"
    file = write_model(f"router: {{engine: vllm, engineArgs: {arguments}}}")
    variables = router_environment(file)
    assert variables["FAASMOE_ENGINE"] == "vllm"
    expected = {"enforce_eager": False, "tool_call_parser": "hermes"}
    assert json.loads(variables["FAASMOE_ENGINE_ARGS"]) == expected


def test_a_router_with_vllm_is_forked_in_the_environment_that_has_it() -> None:
    variables = {"FAASMOE_ENGINE": "vllm", "FAASMOE_VLLM_PYTHON": "/vllm/bin/python"}
    command = ("-m", "faasmoe_router.zygote", "vllm")
    assert zygote_command(variables) == ("/vllm/bin/python", *command)
    assert zygote_command({"FAASMOE_ENGINE": "vllm"}) == (sys.executable, *command)


def test_other_routers_are_forked_by_a_zygote_without_vllm() -> None:
    for engine in ("transformers", "auto"):  # there is no vLLM in this environment
        variables = {"FAASMOE_ENGINE": engine, "FAASMOE_VLLM_PYTHON": "/vllm/bin/python"}
        assert zygote_command(variables) == (sys.executable, "-m", "faasmoe_router.zygote")


def test_a_zygote_forks_routers_of_one_engine_and_of_the_same_variables_for_libraries() -> None:
    ours = {"FAASMOE_ENGINE": "transformers", "OMP_NUM_THREADS": "1"}
    assert zygote_key({**ours, "FAASMOE_PORT": "1"}) == zygote_key({**ours, "FAASMOE_PORT": "2"})
    others = (
        {**ours, "FAASMOE_ENGINE": "vllm"},
        {**ours, "OMP_NUM_THREADS": "2"},
        {**ours, "FAASMOE_KERNELS": "off"},
        {**ours, "FAASMOE_KERNELS_ISA": "avx2"},
    )
    assert len({zygote_key(variables) for variables in (ours, *others)}) == 5


def test_environment_omits_settings_absent_from_spec(write_model: WriteModel) -> None:
    variables = router_environment(write_model())
    for name in ("MAX_MODEL_LEN", "KV_CACHE_BYTES", "TENANTS_FILE", "CORS_ORIGINS"):
        assert f"FAASMOE_{name}" not in variables


def test_served_name_and_origins_are_passed_on(write_model: WriteModel) -> None:
    file = write_model("router: {servedModelName: org/tiny, corsOrigins: ['https://a.example']}")
    variables = router_environment(file, cors_origins=("https://b.example", "https://a.example"))
    assert variables["FAASMOE_MODEL_NAME"] == "org/tiny"
    assert variables["FAASMOE_CORS_ORIGINS"] == "https://a.example,https://b.example"


def test_spec_env_overrides_inherited_environment(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/outer")
    variables = router_environment(write_model("router: {env: [{name: HF_HOME, value: /inner}]}"))
    assert variables["HF_HOME"] == "/inner"


@pytest.mark.parametrize(
    ("experts", "placement"),
    [
        ("experts: {}", "auto"),
        ("experts: {placement: auto}", "auto"),
        ("experts: {placement: functions}", "functions"),
    ],
)
def test_environment_contains_placement(
    experts: str, placement: str, write_model: WriteModel
) -> None:
    assert router_environment(write_model(experts))["FAASMOE_PLACEMENT"] == placement


def test_a_router_is_healthy_once_it_listens_and_says_so(tmp_path: Path) -> None:
    path, statuses = tmp_path / "router.sock", iter((503, 200))
    with socket.socket(socket.AF_UNIX) as earlier:  # of a router that has ended
        earlier.bind(str(path))

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=next(statuses))

    async def scenario() -> None:
        healthy = asyncio.create_task(
            wait_until_healthy(ENDPOINT, progress=lambda _: None, socket_path=path)
        )
        await asyncio.sleep(0)  # probe what does not listen
        app = web.Application()
        app.add_routes([web.get("/health", health)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        async with asyncio.timeout(60):
            await healthy
        await runner.cleanup()

    asyncio.run(scenario())
    assert not list(statuses)


def test_a_router_that_never_listens_is_not_healthy_in_time(tmp_path: Path) -> None:
    waiting = wait_until_healthy(
        ENDPOINT, progress=lambda _: None, timeout_s=0.0, socket_path=tmp_path / "router.sock"
    )
    with pytest.raises(CommandError, match="not healthy within 0 s"):
        asyncio.run(waiting)
