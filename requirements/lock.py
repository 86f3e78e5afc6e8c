"""`python requirements/lock.py`: writes the locks of images and CI, by what pip resolves.

Each lock has every package that an extra needs, at one version, with the SHA-256 of its file for
this platform and Python: run it on each platform that images are built for, and hashes of the same
versions are added to those there are. Locks are installed with `pip install --require-hashes
--no-deps`, so that no index can supply another file. torch has locks of its own, because its builds
lie on different indexes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
TORCH = "torch==2.13.0"
LOCKS: dict[str, Sequence[str]] = {
    "build": ("hatchling>=1.27",),
    "operator": (".[operator,tracing]",),
    "gateway": (".[gateway,tracing]",),
    "expert": (".[expert]", TORCH),
    "router": (".[router,tracing]", TORCH),
    "ci": (".[all,bench]", "--group", "dev", "hatchling>=1.27", TORCH),
    "torch-cpu": (TORCH, "--no-deps"),
    "torch-cuda": (TORCH,),
}
WITHOUT_LOCAL_BUILDS = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
OF_TORCH = re.compile(r"torch|triton|setuptools|(nvidia|cuda)-.*")
OWN, TORCH_NAME = "faasmoe", "torch"
_LINE = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)


def main() -> int:
    """Write the locks, or check that those there are satisfy the project."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*LOCKS, []], help="locks (all)")
    arguments = parser.parse_args()
    for name in arguments.names or LOCKS:
        path = FOLDER / f"{name}.txt"
        has_cuda, is_torch = name == "torch-cuda", name.startswith("torch-")
        resolved = {
            package: entry
            for package, entry in resolve(LOCKS[name], has_cuda=has_cuda).items()
            if is_torch == bool(OF_TORCH.fullmatch(package)) or name == "ci"
        }
        if not is_torch:
            resolved.pop(TORCH_NAME, None)
        path.write_text(format_lock(name, merge(read_lock(path), resolved)))
        print(f"{path}: {len(resolved)} packages")
    return 0


def resolve(requirements: Sequence[str], *, has_cuda: bool) -> dict[str, tuple[str, set[str]]]:
    """Return version and hashes of every package that pip would install, by name.

    Args:
        requirements: arguments of `pip install`.
        has_cuda: whether torch is that of the package index, with its CUDA libraries.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    output = subprocess.run(
        [*command, "--report", "-", *requirements],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, **(WITHOUT_LOCAL_BUILDS if has_cuda else {})},
    ).stdout
    report: dict[str, Any] = json.loads(output)
    resolved = {}
    for entry in report["install"]:
        metadata = entry["metadata"]
        name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
        if name != OWN:
            sha256 = entry["download_info"]["archive_info"]["hashes"]["sha256"]
            resolved[name] = (metadata["version"], {sha256})
    return resolved


def read_lock(path: Path) -> dict[str, tuple[str, set[str]]]:
    """Return version and hashes by name; nothing if there is no lock."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    matches = [_LINE.fullmatch(line) for line in lines]
    assert all(matches), f"{path}: got a line that is no locked package"
    return {
        m["name"]: (m["version"], set(re.findall(r"sha256:([0-9a-f]{64})", m["hashes"])))
        for m in matches
        if m is not None
    }


def merge(
    before: dict[str, tuple[str, set[str]]], resolved: dict[str, tuple[str, set[str]]]
) -> dict[str, tuple[str, set[str]]]:
    """Return what is resolved now, with the hashes of the same versions from before."""
    merged = {}
    for name, (version, hashes) in resolved.items():
        known_version, known_hashes = before.get(name, ("", set()))
        merged[name] = (version, hashes | (known_hashes if known_version == version else set()))
    return merged


def format_lock(name: str, packages: dict[str, tuple[str, set[str]]]) -> str:
    """Return the text of a lock."""
    lines = [f"# {name}: written by requirements/lock.py (make lock)"]
    for package, (version, hashes) in sorted(packages.items()):
        options = "".join(f" --hash=sha256:{sha256}" for sha256 in sorted(hashes))
        lines.append(f"{package}=={version}{options}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
