"""`faasmoe doctor`: whether this machine can serve models: packages, kernels, limits, ports."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from faasmoe_kernels import describe_cpu_kernels
from faasmoe_operator.cli import router, runtime_dir
from faasmoe_operator.cli.formatting import format_bytes, format_table
from faasmoe_operator.errors import CommandError
from faasmoe_tracing.environment import INSTALL_HINT, is_installed

MIN_PYTHON = (3, 11)
MIN_CORES = 2
MIN_FREE_MEMORY_BYTES = 4 << 30
MIN_FREE_DISK_BYTES = 10 << 30
MIN_SHARED_BYTES = 256 << 20
MIN_OPEN_FILES = 4096
SERVING_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "aiohttp", "tokenizers")
SHARED_MEMORY = Path("/dev/shm")


class Verdict(StrEnum):
    """What a check finds."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was looked at.
        verdict: how it is.
        found: what was found.
        advice: what to do; empty if it is fine.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Return whether this Python is recent enough."""
    found = ".".join(map(str, version))
    if version >= MIN_PYTHON:
        return Check("Python", Verdict.OK, found)
    return Check("Python", Verdict.FAILED, found, "3.11 or newer")


def check_packages(find: Callable[[str], str | None]) -> Check:
    """Return whether the packages that serve models are installed.

    Args:
        find: returns the version of an installed distribution, None without it.
    """
    missing = [name for name in SERVING_PACKAGES if find(name) is None]
    if missing:
        found = f"{', '.join(missing)} are missing"
        return Check("packages", Verdict.FAILED, found, "pip install 'faasmoe[all]'")
    return Check(
        "packages", Verdict.OK, f"torch {find('torch')}, transformers {find('transformers')}"
    )


def check_kernels(description: str) -> Check:
    """Return whether the CPU kernels are compiled and fast here.

    Args:
        description: what the kernel library says of itself and the CPU.
    """
    if description.startswith("native"):
        return Check("CPU kernels", Verdict.OK, description)
    return Check("CPU kernels", Verdict.WARNING, description, "install g++, then `make kernels`")


def check_cores(n: int) -> Check:
    """Return whether there are cores for a router and its sandboxes."""
    if n >= MIN_CORES:
        return Check("cores", Verdict.OK, str(n))
    return Check("cores", Verdict.WARNING, str(n), f"router and sandboxes want {MIN_CORES} or more")


def check_memory(total_bytes: int, available_bytes: int, limit_bytes: int | None) -> Check:
    """Return whether there is memory for a model.

    Args:
        total_bytes: of the machine.
        available_bytes: that processes can get.
        limit_bytes: of this process's control group; None for no limit.
    """
    free = available_bytes if limit_bytes is None else min(available_bytes, limit_bytes)
    found = f"{format_bytes(available_bytes)} of {format_bytes(total_bytes)} available"
    if limit_bytes is not None and limit_bytes < total_bytes:
        found += f", limited to {format_bytes(limit_bytes)}"
    if free >= MIN_FREE_MEMORY_BYTES:
        return Check("memory", Verdict.OK, found)
    advice = "a router takes 1.3 GB and its weights: see `faasmoe plan MODEL`"
    return Check("memory", Verdict.WARNING, found, advice)


def check_shared_memory(free_bytes: int | None) -> Check:
    """Return whether mailboxes fit into /dev/shm; None if there is none."""
    if free_bytes is None:
        return Check("shared memory", Verdict.WARNING, "no /dev/shm", "calls go over HTTP, slower")
    found = f"{format_bytes(free_bytes)} free in /dev/shm"
    if free_bytes >= MIN_SHARED_BYTES:
        return Check("shared memory", Verdict.OK, found)
    return Check("shared memory", Verdict.WARNING, found, "in Docker: --shm-size 1g")


def check_disk(folder: Path, free_bytes: int) -> Check:
    """Return whether the folder of stores has place."""
    found = f"{format_bytes(free_bytes)} free in {folder}"
    if free_bytes >= MIN_FREE_DISK_BYTES:
        return Check("disk", Verdict.OK, found)
    advice = "XDG_CACHE_HOME and HF_HOME choose other disks"
    return Check("disk", Verdict.WARNING, found, advice)


def check_open_files(soft: int, hard: int) -> Check:
    """Return whether the process may open a file per connection."""
    if soft >= MIN_OPEN_FILES:
        return Check("open files", Verdict.OK, str(soft))
    advice = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
    return Check("open files", Verdict.WARNING, f"{soft}, which bounds connections", advice)


def check_port(host: str, port: int) -> Check:
    """Return whether a port is free."""
    name = f"port {port}"
    try:
        router.Endpoint(host, port).check_free()
    except CommandError as error:
        return Check(name, Verdict.WARNING, str(error), "--port of `faasmoe up`")
    return Check(name, Verdict.OK, f"free on {host}")


def check_runtime_dir() -> Check:
    """Return whether the folder by which commands find each other can be used."""
    try:
        instances = runtime_dir.list_instances()
    except CommandError as error:
        return Check("runtime folder", Verdict.FAILED, str(error), "set XDG_RUNTIME_DIR")
    names = ", ".join(instance.name for instance in instances) or "no model is running"
    return Check("runtime folder", Verdict.OK, names)


def check_traces(installed: bool) -> Check:
    """Return whether requests can be traced."""
    if installed:
        return Check("traces", Verdict.OK, "OpenTelemetry is installed")
    return Check("traces", Verdict.OK, f"not installed ({INSTALL_HINT})")


def run_checks(*, host: str, port: int) -> list[Check]:
    """Return the results of all checks on this machine."""
    memory = _memory_info()
    folder = _cache_folder(os.environ)
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
    return [
        check_python(),
        check_packages(_installed_version),
        check_kernels(describe_cpu_kernels()),
        check_cores(len(os.sched_getaffinity(0))),
        check_memory(memory["MemTotal"], memory["MemAvailable"], _memory_limit()),
        check_shared_memory(shared),
        check_disk(folder, shutil.disk_usage(folder).free),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_port(host, port),
        check_runtime_dir(),
        check_traces(is_installed()),
    ]


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_info() -> dict[str, int]:
    """Return the sizes of /proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    pairs = (line.split(":") for line in lines)
    return {name: int(rest.split()[0]) << 10 for name, rest in pairs}


def _memory_limit() -> int | None:
    """Return the memory limit of this control group (version 2) in bytes; None for no limit."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cache_folder(env: Mapping[str, str]) -> Path:
    """Return the nearest folder that exists of where stores are kept."""
    path = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faasmoe" / "stores"
    return next(p for p in (path, *path.parents) if p.is_dir())


def render_checks(checks: list[Check]) -> str:
    """Return the results as a table, with what to do."""
    machine = f"{platform.machine()}, Linux {platform.release()}"
    rows = [(c.name, c.verdict.value, c.found) for c in checks]
    advice = [f"{c.name}: {c.advice}" for c in checks if c.verdict is not Verdict.OK]
    lines = [machine, "", format_table(("CHECK", "", "FOUND"), rows)]
    return "\n".join([*lines, *(["", *advice] if advice else [])])


def add_commands(commands: Any) -> None:
    """Add `faasmoe doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="check whether this machine can serve models",
        description="Check this machine: packages, CPU kernels, memory, disk, limits, ports. The\n"
        "exit status is 1 if something keeps `faasmoe up` from working, else 0.",
        epilog="Examples:\n  faasmoe doctor\n  faasmoe doctor --port 9000 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to be served on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to be served on (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the results of all checks."""
    checks = run_checks(host=arguments.host, port=arguments.port)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print(render_checks(checks))
    return int(any(check.verdict is Verdict.FAILED for check in checks))
