"""`python -m tests.chaos --seed N --minutes M`: a chaos run on the demo model.

Writes benchmarks/out/chaos.json; `--replay FILE` repeats the schedule of such a file. Exits with
status 1 if a request failed, a response was wrong, usage was not exact or the system did not
recover.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from faasmoe_contracts.store import MANIFEST_NAME, Store, StoreError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from tests.chaos.run import ChaosPlan, run_chaos  # noqa: E402
from tests.chaos.schedule import Fault, FaultKind, draw_schedule  # noqa: E402

FAASMOE = (sys.executable, "-m", "faasmoe_operator.cli")
WORK = ROOT / ".faasmoe" / "chaos"
DEMO = ROOT / ".faasmoe" / "demo-model"


def main() -> int:
    """Parse the command line, perform a run and print its report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of the schedule (%(default)s)")
    parser.add_argument("--minutes", type=float, default=2.0, help="duration (%(default)s)")
    parser.add_argument(
        "--kills-only-fraction",
        type=float,
        default=0.25,
        metavar="F",
        help="initial fraction of the time with kills of sandboxes only (%(default)s)",
    )
    parser.add_argument(
        "--period", type=float, default=1.0, help="seconds between faults (%(default)s)"
    )
    parser.add_argument(
        "--only",
        type=FaultKind,
        action="append",
        metavar="KIND",
        help="inject only this kind of fault; may be repeated "
        f"({', '.join(kind.value for kind in FaultKind)})",
    )
    parser.add_argument("--replay", type=Path, help="repeat the schedule of this report")
    parser.add_argument("--model", type=Path, default=DEMO, help="checkpoint (the demo model)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "out" / "chaos.json",
        help="report to write (%(default)s)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.replay is not None:
        before = json.loads(arguments.replay.read_text())
        faults = [Fault.from_json(value) for value in before["schedule"]]
        seed, duration_s = before["seed"], before["duration_s"]
        kills_only_s = before.get("kills_alone_s", 0.0)  # missing in old reports
    else:
        seed, duration_s = arguments.seed, arguments.minutes * 60
        kills_only_s = arguments.kills_only_fraction * duration_s
        faults = draw_schedule(
            seed, duration_s=duration_s, period_s=arguments.period, kills_only_s=kills_only_s
        )
    if arguments.only:
        faults = [fault for fault in faults if fault.kind in arguments.only]
    model, store = _prepared(arguments.model)
    sizes: dict[str, Any] = {"experts": 3, "capacity": 30, "replicated_layers": "0-9"}
    plan = ChaosPlan(seed, duration_s, faults, model, store, kills_only_s=kills_only_s, **sizes)
    report = asyncio.run(run_chaos(plan, WORK))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, value in report.items():
        if name != "schedule":
            print(f"{name}: {value}")
    print(f"figures: {arguments.out}")
    is_exact = report["answers_by_tenant"] == report["accounted_by_tenant"]
    is_right = not report["failed"] and not report["wrong"] and is_exact
    return 0 if is_right and report["recovered"] else 1


def _prepared(model: Path) -> tuple[Path, Path]:
    """Return the checkpoint and its store; generate them unless they exist.

    The store is float32. In bfloat16, the number of rows in a batch decides near-ties on some CPUs
    (with AMX in every second response), so that a correct response could look wrong.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    if model == DEMO and not (DEMO / "config.json").exists():
        subprocess.run([*FAASMOE, "demo-model", str(DEMO)], check=True)
    store = WORK / f"{model.name}-float32-store"
    if not _is_readable(store):
        prepare = ("prepare", "--dtype", "float32", str(model), str(store), "--force")
        subprocess.run([*FAASMOE, *prepare], check=True)
    return model.resolve(), store.resolve()


def _is_readable(store: Path) -> bool:
    try:
        return (store / MANIFEST_NAME).exists() and bool(Store.open(store))
    except StoreError:  # written by an earlier version
        return False


if __name__ == "__main__":
    sys.exit(main())
