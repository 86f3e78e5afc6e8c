from dataclasses import replace
from typing import Any

import pytest

from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.platforms.base import ProcessSandboxTemplate, Sandbox

SANDBOX = Sandbox("s1", "127.0.0.1:1", False, "t")


def new_fleet(*sandboxes: Sandbox) -> Fleet:
    fleet = Fleet({}, template=ProcessSandboxTemplate(4))
    fleet.sync(sandboxes, now=0.0)
    return fleet


def test_a_sandbox_that_becomes_ready_changes_nothing_until_it_is_read_back() -> None:
    fleet = new_fleet(SANDBOX)
    version = fleet.version
    fleet.sync([replace(SANDBOX, ready=True)], now=1.0)
    assert fleet.version == version
    assert [record.sandbox.id for record in fleet.awaiting_read_back()] == ["s1"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"address": "127.0.0.1:2"}, id="another address"),
        pytest.param({"terminating": True}, id="being deleted"),
        pytest.param({"id": "s2"}, id="another sandbox"),
    ],
)
def test_tells_what_has_changed_about_sandboxes(changes: dict[str, Any]) -> None:
    fleet = new_fleet(SANDBOX)
    version = fleet.version
    fleet.sync([replace(SANDBOX, **changes)], now=1.0)
    assert fleet.version > version


def test_tells_that_a_sandbox_is_gone() -> None:
    fleet = new_fleet(SANDBOX)
    version = fleet.version
    assert [record.sandbox.id for record in fleet.sync([], now=1.0)] == ["s1"]
    assert fleet.version > version
