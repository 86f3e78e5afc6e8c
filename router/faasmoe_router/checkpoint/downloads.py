"""A folder of the hub's downloads that is of no use any more once the store is complete.

A download is as large as the checkpoint. It is kept while a preparation may have to be tried again,
and a claim that is to hold the store alone need not hold both from then on.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from faasmoe_router.checkpoint.errors import PrepareError

_log = logging.getLogger(__name__)


def check_apart(downloads: Path, store: Path) -> None:
    """Raise PrepareError if the store would be removed with the downloads."""
    if store.resolve().is_relative_to(downloads.resolve()):
        raise PrepareError(
            f"discard-download: got {downloads}, expected a folder that the store {store} is not in"
        )


def discard(downloads: Path) -> None:
    """Remove the downloads; the store is complete without them, so what stays is only told."""
    if not downloads.exists():
        return
    try:
        shutil.rmtree(downloads)
    except OSError as error:
        _log.warning("%s stays: %s", downloads, error)
    else:
        _log.info("%s is removed: the store has it all", downloads)
