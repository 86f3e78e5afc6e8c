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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "src"
LIBRARY = ROOT / "faasmoe_kernels" / "libfaasmoe_kernels.so"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-fno-math-errno", "-pthread", "-Wall", "-Wno-psabi"),
    # GCC 12 takes its own intrinsics' undefined vectors for a fault (GCC bug 105593).
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2_FLAGS)
AVX512_BF16_FLAGS = ("-mavx512vnni", "-mavx512bf16", *AVX512_FLAGS)
X86_ISAS = ("avx2", "avx512", "avx512_bf16")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": AVX512_BF16_FLAGS,
    "neon": (),
}
SANITIZER_FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-O1", "-g1", "-fno-omit-frame-pointer"),  # more than lines takes GCC twice the time
)
# GCC 12 places vectors of 64 bytes at multiples of 32 in frames with red zones (GCC bug 110027).
SANITIZER_ISA_FLAGS = dict.fromkeys(("avx512", "avx512_bf16"), ("--param=asan-stack=0",))


def find_compiler() -> str | None:
    """Return the C++ compiler: $CXX, or the first of c++, g++ and clang++; None without one."""
    if cxx := os.environ.get("CXX"):
        return cxx
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def translation_units(
    machine: str, *, extra_isa_flags: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[list[str], list[tuple[str, tuple[str, ...]]]]:
    """Return the definitions for a machine, and its source files with their flags.

    Every `src/*.cpp` is compiled; an `*_ISA.cpp` only for machines that can have ISA, with its
    flags and those of `extra_isa_flags`.
    """
    extra = extra_isa_flags or {}
    definitions, flags = _instruction_sets(machine)
    units: list[tuple[str, tuple[str, ...]]] = []
    for path in sorted(SOURCES.glob("*.cpp")):
        isa = next((isa for isa in ISA_FLAGS if path.stem.endswith(f"_{isa}")), None)
        if isa is None:
            units.append((path.name, ()))
        elif isa in flags:
            units.append((path.name, (*flags[isa], *extra.get(isa, ()))))
    return definitions, units


def _instruction_sets(machine: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Return the definitions for a machine, and its instruction sets with their flags."""
    if machine in ("x86_64", "AMD64"):
        return ["-DFK_WITH_X86"], {isa: ISA_FLAGS[isa] for isa in X86_ISAS}
    if machine in ("aarch64", "arm64"):
        return ["-DFK_WITH_NEON"], {"neon": ()}
    return [], {}


def build(
    compiler: str,
    target: Path,
    *,
    extra_flags: Sequence[str] = (),
    extra_isa_flags: Mapping[str, tuple[str, ...]] | None = None,
    extra_sources: Sequence[Path] = (),
    shared: bool = True,
) -> None:
    """Compile and link the library, or a program with the library in it.

    Args:
        compiler: the C++ compiler.
        target: file to write; replaced atomically, so that processes that have it mapped keep it.
        extra_flags: flags that follow the usual ones.
        extra_isa_flags: last flags of the sources of one instruction set.
        extra_sources: further sources; they may include the library's headers.
        shared: whether to link a shared library; else a program, whose `main` is in
            `extra_sources`.

    Raises:
        CalledProcessError: the compiler failed; its output is on stderr.
    """
    definitions, units = translation_units(platform.machine(), extra_isa_flags=extra_isa_flags)
    flags = (compiler, *FLAGS, f"-I{SOURCES}", *definitions)
    sources = [(SOURCES / name, unit_flags) for name, unit_flags in units]
    sources += [(source, ()) for source in extra_sources]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder) / f"{source.name}.o") for source, _ in sources]
        commands = [
            (*flags, *extra_flags, *unit_flags, "-c", str(source), "-o", object_path)
            for (source, unit_flags), object_path in zip(sources, objects, strict=True)
        ]
        for done, _ in enumerate(pool.map(_run, commands), start=1):
            _show_progress(done, len(commands))
        linked = target.with_suffix(f".{os.getpid()}.tmp")
        kind = ("-shared",) if shared else ()
        _run((compiler, *kind, "-pthread", *extra_flags, *objects, "-o", str(linked)))
        linked.replace(target)


def _show_progress(done: int, total: int) -> None:
    """Show on a terminal how many sources are compiled; a log gets nothing."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        bar = "#" * (20 * done // total)
        print(
            f"\rcompiling kernels [{bar:<20}] {done}/{total}", end=end, file=sys.stderr, flush=True
        )


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
