"""Builds the kernel library with this machine's C++ compiler.

A hatchling build hook (`[tool.hatch.build.hooks.custom]`) and a command: `python
kernels/hatch_build.py`. Without a compiler nothing is built and the installation succeeds: torch
computes instead. A compiler that fails is an error.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "src"
LIBRARY = ROOT / "faasmoe_kernels" / "libfaasmoe_kernels.so"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-fno-math-errno", "-pthread", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"),
)
COMMON_SOURCES = ("faasmoe_kernels.cpp", "thread_pool.cpp", "isa_portable.cpp", "sigbus_guard.cpp")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2_FLAGS)
SANITIZER_FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-O1", "-g", "-fno-omit-frame-pointer"),
)


def find_compiler() -> str | None:
    """Return the C++ compiler: $CXX, or the first of c++, g++ and clang++; None without one."""
    if cxx := os.environ.get("CXX"):
        return cxx
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def translation_units(machine: str) -> tuple[list[str], list[tuple[str, tuple[str, ...]]]]:
    """Return the definitions for a machine, and its source files with their flags."""
    units: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in COMMON_SOURCES]
    if machine in ("x86_64", "AMD64"):
        avx = [("isa_avx2.cpp", AVX2_FLAGS), ("isa_avx512.cpp", AVX512_FLAGS)]
        return ["-DFK_WITH_X86"], units + avx
    if machine in ("aarch64", "arm64"):
        return ["-DFK_WITH_NEON"], [*units, ("isa_neon.cpp", ())]
    return [], units


def build(
    compiler: str,
    target: Path,
    *,
    extra_flags: Sequence[str] = (),
    extra_sources: Sequence[Path] = (),
    shared: bool = True,
) -> None:
    """Compile and link the library, or a program with the library in it.

    Args:
        compiler: the C++ compiler.
        target: file to write; replaced atomically, so that processes that have it mapped keep it.
        extra_flags: flags that follow the usual ones.
        extra_sources: further sources; they may include the library's headers.
        shared: whether to link a shared library; else a program, whose `main` is in
            `extra_sources`.

    Raises:
        CalledProcessError: the compiler failed; its output is on stderr.
    """
    definitions, units = translation_units(platform.machine())
    flags = (compiler, *FLAGS, f"-I{SOURCES}", *definitions)
    sources = [(SOURCES / name, unit_flags) for name, unit_flags in units]
    sources += [(source, ()) for source in extra_sources]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder) / f"{source.name}.o") for source, _ in sources]
        commands = [
            (*flags, *unit_flags, *extra_flags, "-c", str(source), "-o", object_path)
            for (source, unit_flags), object_path in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        linked = target.with_suffix(f".{os.getpid()}.tmp")
        kind = ("-shared",) if shared else ()
        _run((compiler, *kind, "-pthread", *extra_flags, *objects, "-o", str(linked)))
        linked.replace(target)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


def is_up_to_date() -> bool:
    """Return whether the library is newer than its sources and this file."""
    if not LIBRARY.exists():
        return False
    newest = max(path.stat().st_mtime_ns for path in (*SOURCES.iterdir(), Path(__file__)))
    return LIBRARY.stat().st_mtime_ns >= newest


def build_if_possible() -> bool:
    """Build the library if a compiler is found; return whether there is an up-to-date library."""
    if is_up_to_date():
        return True
    compiler = find_compiler()
    if compiler is None:
        LIBRARY.unlink(missing_ok=True)  # one of other sources would be used otherwise
        print(
            "faasmoe_kernels: no C++ compiler (c++, g++, clang++): "
            "CPU kernels are not built, torch is used instead",
            file=sys.stderr,
        )
        return False
    build(compiler, LIBRARY)
    return True


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a command, outside a build
    pass
else:

    class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
        """Builds the library before a wheel or an editable installation."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Build, and mark a wheel that carries the library as one of this platform."""
            if self.target_name != "wheel" or not build_if_possible():
                return
            build_data["artifacts"].append(f"/{LIBRARY.relative_to(ROOT.parent)}")
            if version != "editable":
                tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{tag}"


if __name__ == "__main__":
    build_if_possible()
