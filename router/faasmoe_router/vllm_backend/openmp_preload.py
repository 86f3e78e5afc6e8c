"""Restarts a process with torch's OpenMP library preloaded, which vLLM's engine on a CPU needs.

vLLM binds OpenMP's threads to cores. With the library that torch ships loaded in the ordinary way,
only one of these cores then computes (vLLM's issue 27369), so vLLM sets `LD_PRELOAD` for an engine
that it starts as a new process. Ours is a fork, which has the libraries of its parent.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "LD_PRELOAD"
LIBRARIES = ("libgomp", "libiomp", "libomp")


def preload_openmp() -> None:
    """Restart this process with torch's OpenMP library, unless one is preloaded; on Linux only.

    To be called before anything is imported that takes time. A process keeps its id, its open file
    descriptors and its death with its parent. A fork has what its parent has preloaded, whatever
    its environment says.
    """
    torch = find_spec("torch")
    if not sys.platform.startswith("linux") or torch is None or torch.origin is None:
        return
    preload = preload_with_openmp(_loaded_with(), Path(torch.origin).parent)
    if preload is None:
        return
    os.environ[VARIABLE] = preload
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _loaded_with() -> str:
    """Return the variable's value when this process, or what it is a fork of, was loaded."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    values = [e.partition(b"=")[2] for e in entries if e.startswith(f"{VARIABLE}=".encode())]
    return os.fsdecode(values[0]) if values else ""


def preload_with_openmp(preload: str, torch: Path) -> str | None:
    """Return the value of LD_PRELOAD with torch's OpenMP library added.

    Args:
        preload: its value now.
        torch: torch's folder, whose `lib`, or `torch.libs` beside it, has the library.

    Returns:
        None if a library of OpenMP is preloaded already, or torch ships none.
    """
    if any(name in preload for name in LIBRARIES):
        return None
    folders = (torch.with_name("torch.libs"), torch / "lib")
    found = [file for folder in folders for file in sorted(folder.glob("libgomp*.so*"))]
    return ":".join(filter(None, (preload, str(found[0])))) if found else None
