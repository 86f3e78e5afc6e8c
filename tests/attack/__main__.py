"""`python -m tests.attack`: storms against a real `faasmoe up` with three keyed tenants.

Writes benchmarks/out/attack.json and exits with status 1 if a figure exceeds its bound, and with
status 2 and the reason if nothing was measured. Every storm is bounded in time and drawn from a
seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from tests.attack.clients import AttackFailed  # noqa: E402
from tests.attack.run import BOUNDS, attack  # noqa: E402


def main() -> int:
    """Parse the command line, attack and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of the storms (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="duration of the calm and of each storm"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "out" / "attack.json",
        help="report to write (%(default)s)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        try:
            figures = attack(Path(folder), seed=arguments.seed, seconds=arguments.seconds)
        except AttackFailed as error:
            print(f"attack: {error}", file=sys.stderr)
            return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    exceeded = [name for name, is_met in BOUNDS.items() if not is_met(figures[name])]
    for name in exceeded:
        print(f"attack: {name}: got {figures[name]}, which exceeds its bound", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
