"""Copies a checkpoint into a claim and makes it writable for all users; runs in a pod, as root.

    fill_claim.py FILES CLAIM FOLDER

Some volumes, such as hostPath, do not support fsGroup.
"""

import shutil
import sys
from pathlib import Path


def main(files: str, claim: str, folder: str) -> None:
    """Copy the files of a ConfigMap volume, which also has links and hidden folders."""
    Path(claim).chmod(0o777)
    target = Path(claim, folder)
    target.mkdir(exist_ok=True)
    for path in Path(files).iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
