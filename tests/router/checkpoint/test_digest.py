"""A store of an earlier version, or with a changed manifest, is refused with its remedy."""

import json
from pathlib import Path

import pytest
from checkpoints import MakeCheckpoint

from faasmoe_expert.store import Store, StoreError
from faasmoe_router.checkpoint import prepare


def test_a_changed_manifest_is_refused_and_force_makes_it_anew(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, folder = str(make_checkpoint("mixtral")), tmp_path / "store"
    made = prepare(source, folder)
    path = folder / "manifest.json"
    changed = json.loads(path.read_text())
    changed["layers"][0]["kernel"] = None
    path.write_text(json.dumps(changed))
    for read in (lambda: Store.open(folder), lambda: prepare(source, folder)):
        with pytest.raises(StoreError, match="manifest.digest: got .* again with --force"):
            read()
    assert prepare(source, folder, force=True).manifest == made.manifest
