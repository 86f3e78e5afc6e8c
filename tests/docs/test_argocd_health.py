"""Argo CD's health check of a MoEModel, run by a real Lua (Debian's package `lua5.4`)."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "kubernetes" / "argocd" / "health.lua"
RUNNER = (
    "obj = {obj}\nlocal hs = dofile('{script}')\nprint(hs.status .. '|' .. (hs.message or ''))\n"
)


def to_lua(value: Any) -> str:
    """Return a JSON value as a Lua literal, as Argo CD passes objects to scripts."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'["{key}"] = {to_lua(x)}' for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(to_lua, value)) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def health(obj: Any, folder: Path) -> list[str]:
    lua = next(filter(None, map(shutil.which, ("lua5.4", "lua5.3", "lua"))), None)
    if lua is None:
        assert "REQUIRE_LUA" not in os.environ, "no lua on the PATH"
        pytest.skip("no lua on the PATH")
    program = folder / "run.lua"
    program.write_text(RUNNER.format(obj=to_lua(obj), script=SCRIPT))
    done = subprocess.run([lua, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


def model(status: str, reason: str, *, observed: int = 2) -> Any:
    ready = {"type": "Ready", "status": status, "reason": reason, "message": "why"}
    others = [{"type": "StoreReady", "status": "True", "reason": "Prepared", "message": "x"}]
    return {
        "metadata": {"name": "qwen", "generation": 2},
        "status": {"observedGeneration": observed, "conditions": [*others, ready]},
    }


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (model("True", "Ready"), ["Healthy", "why"]),
        (model("False", "Unschedulable"), ["Degraded", "why"]),
        (model("Unknown", "Preparing"), ["Progressing", "why"]),
        (model("False", "Suspended"), ["Suspended", "why"]),
        (
            model("True", "Ready", observed=1),
            ["Progressing", "waiting for the FaaSMoE operator"],
        ),
        (
            {"metadata": {"name": "qwen", "generation": 1}},
            ["Progressing", "waiting for the FaaSMoE operator"],
        ),
        (
            {"metadata": {"name": "qwen", "generation": 1}, "status": {"conditions": []}},
            ["Progressing", "waiting for the FaaSMoE operator"],
        ),
    ],
)
def test_health_follows_ready(obj: Any, expected: list[str], tmp_path: Path) -> None:
    assert health(obj, tmp_path) == expected
