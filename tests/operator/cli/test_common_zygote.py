"""Which zygotes are forks of a common one."""

import os
import sys

import pytest

from faasmoe_operator.cli.common_zygote import COMMAND, can_fork
from faasmoe_operator.cli.router import DEFAULT_ENVIRONMENT, ZYGOTE_COMMAND, zygote_environment
from faasmoe_operator.platforms import zygote

PLAIN = {"PATH": "/bin", "LANG": "C"}
PARENT = zygote_environment({**DEFAULT_ENVIRONMENT, **PLAIN})
SANDBOXES = {**PLAIN, **zygote.SANDBOX_ENVIRONMENT}


def test_both_zygotes_are_forks_in_an_ordinary_environment() -> None:
    settings = {"FAASMOE_TOKEN": "t", "FAASMOE_DEVICE": "cpu"}
    assert can_fork(PARENT, zygote.ZYGOTE_COMMAND, {**SANDBOXES, **settings})
    assert can_fork(PARENT, ZYGOTE_COMMAND, {**PARENT, "OTEL_SERVICE_NAME": "router"})


@pytest.mark.parametrize(
    "command",
    [
        pytest.param((*ZYGOTE_COMMAND, "vllm"), id="vllm"),
        pytest.param(("/other/python", *ZYGOTE_COMMAND[1:]), id="interpreter"),
        pytest.param((sys.executable, "/some/script.py"), id="script"),
        pytest.param(COMMAND, id="itself"),
    ],
)
def test_other_commands_are_processes_of_their_own(command: tuple[str, ...]) -> None:
    assert not can_fork(PARENT, command, PARENT)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_PRELOAD", "HF_HOME"])
def test_routers_with_other_variables_for_libraries_have_a_zygote_of_their_own(name: str) -> None:
    assert not can_fork(PARENT, ZYGOTE_COMMAND, {**PARENT, name: "2"})


def test_sandboxes_beside_spinning_routers_have_a_zygote_of_their_own() -> None:
    spinning = {**PARENT, "OMP_WAIT_POLICY": "ACTIVE"}
    assert not can_fork(spinning, zygote.ZYGOTE_COMMAND, SANDBOXES)
    assert not can_fork({**PARENT, "GOMP_SPINCOUNT": "9"}, zygote.ZYGOTE_COMMAND, SANDBOXES)


def test_this_processs_environment_is_an_ordinary_one_for_sandboxes() -> None:
    inherited = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    inherited.pop("GOMP_SPINCOUNT", None)
    parent = zygote_environment({**DEFAULT_ENVIRONMENT, **inherited})
    assert can_fork(parent, zygote.ZYGOTE_COMMAND, {**inherited, **zygote.SANDBOX_ENVIRONMENT})
