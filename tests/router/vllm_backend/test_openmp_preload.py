"""vLLM's engine is forked with torch's OpenMP library preloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faasmoe_router.vllm_backend.openmp_preload import VARIABLE, preload_with_openmp

SCRIPT = """
import os, sys
from faasmoe_router.vllm_backend.openmp_preload import preload_openmp
n_starts = os.environ.get("N_STARTS", "")
assert len(n_starts) < 2, "restarted again"
os.environ["N_STARTS"] = n_starts + "+"
preload_openmp()
if os.fork() == 0:  # as a router that the zygote forks, with the launcher's environment
    os.environ.pop("LD_PRELOAD")
    preload_openmp()
    os._exit(0)
assert os.wait()[1] == 0
maps = open("/proc/self/maps").read()
print(n_starts, os.getpid(), "libgomp" in maps, "torch" in sys.modules, *sys.argv[1:])
"""


@pytest.fixture
def torch_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib/libgomp.so.1").touch()
    return folder


def test_adds_the_library_that_torch_ships(torch_folder: Path) -> None:
    library = str(torch_folder / "lib/libgomp.so.1")
    assert preload_with_openmp("", torch_folder) == library
    assert preload_with_openmp("/lib/libtcmalloc.so", torch_folder) == (
        f"/lib/libtcmalloc.so:{library}"
    )


def test_prefers_the_folder_beside_torch(torch_folder: Path) -> None:
    library = torch_folder.with_name("torch.libs") / "libgomp-a1b2.so.1.0.0"
    library.parent.mkdir()
    library.touch()
    assert preload_with_openmp("", torch_folder) == str(library)


@pytest.mark.parametrize("preload", ["/lib/libiomp5.so", "/a.so:/lib/libgomp.so.1", "libomp.so"])
def test_keeps_what_is_preloaded(torch_folder: Path, preload: str) -> None:
    assert preload_with_openmp(preload, torch_folder) is None


def test_changes_nothing_where_torch_ships_none(tmp_path: Path) -> None:
    assert preload_with_openmp("", tmp_path / "torch") is None


@pytest.mark.skipif(
    not any(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="torch ships no libgomp"
)
def test_process_restarts_once_with_its_arguments() -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "an", "argument"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate()
    assert process.returncode == 0
    assert output.split() == ["+", str(process.pid), "True", "False", "an", "argument"]
