"""Time and disk of `faasmoe prepare` on Qwen1.5-MoE's geometry, by reference and by copying.

`python -m benchmarks.prepare [--layers N] [--repeats N] [--folder FOLDER]` generates a checkpoint
and prepares it, each time with none of it in the page cache. It is compared with one sequential
read of the checkpoint's files, as cold as that. Writes benchmarks/out/prepare.json:

* `time_over_read`: time of the preparation over that of the read. Imports are not part of it; the
  whole command with them is `command_s`.
* `disk_over_checkpoint`: what the store adds on the disk, over the checkpoint's size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.geometry import CheckpointGeometry, make_checkpoint, qwen_geometry, small_geometry
from benchmarks.report import OUT, Spread, describe_machine, write_figures

MODES = ("reference", "copy")
LAYERS = 4
REPEATS = 3
BUFFER_BYTES = 4 << 20
_CHILD = """
import json, sys, time
from pathlib import Path
from faasmoe_contracts.store.references import StoreMode
from faasmoe_router.checkpoint.prepare import prepare
started_s = time.perf_counter()
prepare(sys.argv[1], Path(sys.argv[2]), mode=StoreMode(sys.argv[3]))
print(json.dumps(time.perf_counter() - started_s))
"""


def drop_cached(folder: Path) -> None:
    """Write the files of a folder to the disk and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def read_once(folder: Path) -> float:
    """Return the seconds of reading every weight file once, one after the other."""
    drop_cached(folder)
    buffer = bytearray(BUFFER_BYTES)
    started_s = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started_s


def prepare_once(checkpoint: Path, store: Path, mode: str) -> tuple[float, float]:
    """Prepare a store anew; return the seconds of the preparation, and of the whole process."""
    shutil.rmtree(store, ignore_errors=True)
    drop_cached(checkpoint)
    started_s = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(checkpoint), str(store), mode],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(json.loads(child.stdout)), time.perf_counter() - started_s


def disk_bytes(folder: Path) -> int:
    """Return the bytes that a folder's files occupy on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def measure(geometry: CheckpointGeometry, folder: Path, *, repeats: int) -> dict[str, Any]:
    """Return the figures of one geometry.

    Args:
        geometry: the checkpoint's sizes.
        folder: where the checkpoint and, one at a time, the stores are written.
        repeats: preparations per mode, each beside one read.
    """
    checkpoint, store = folder / geometry.name, folder / f"{geometry.name}-prepared"
    make_checkpoint(geometry, checkpoint)
    size_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    reads_s: list[float] = []
    modes: dict[str, Any] = {}
    for mode in MODES:
        over_read, prepare_s, command_s = [], [], []
        for _ in range(repeats):
            reads_s.append(read_once(checkpoint))
            prepared_s, process_s = prepare_once(checkpoint, store, mode)
            over_read.append(prepared_s / reads_s[-1])
            prepare_s.append(prepared_s)
            command_s.append(process_s)
        modes[mode] = {
            "time_over_read": Spread.from_values(over_read),
            "disk_over_checkpoint": disk_bytes(store) / size_bytes,
            "prepare_s": Spread.from_values(prepare_s),
            "command_s": Spread.from_values(command_s),
        }
        shutil.rmtree(store)
    return {
        "layers": geometry.layers,
        "checkpoint_bytes": size_bytes,
        "read_s": Spread.from_values(reads_s),
        **modes,
    }


def main() -> int:
    """Measure, write the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of 24 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--folder", type=Path, default=OUT / "prepare")
    parser.add_argument("--small", action="store_true", help="a geometry that takes seconds")
    arguments = parser.parse_args()
    geometry = small_geometry() if arguments.small else qwen_geometry(arguments.layers)
    machine = describe_machine()
    figures = measure(geometry, arguments.folder, repeats=arguments.repeats)
    path = write_figures("prepare", {"machine": machine, **figures}, folder=OUT)
    print(f"read once: {figures['read_s'].format(2)} s")
    for mode in MODES:
        values = figures[mode]
        print(
            f"{mode}: {values['time_over_read'].format(2)} × the read, "
            f"{values['disk_over_checkpoint']:.4f} of its disk, "
            f"command {values['command_s'].format(1)} s"
        )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
