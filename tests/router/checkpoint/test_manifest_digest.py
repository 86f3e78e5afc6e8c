"""A store whose manifest was changed is rejected, and the error names the remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from faasmoe_contracts.store import Store, StoreError
from faasmoe_router.checkpoint.prepare import prepare

MakeCheckpoint = Callable[..., Path]


def test_changed_manifest_is_rejected_and_force_replaces_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, folder = str(make_checkpoint("mixtral")), tmp_path / "store"
    original = prepare(source, folder)
    path = folder / "manifest.json"
    changed = json.loads(path.read_text())
    changed["layers"][0]["kernel"] = None
    path.write_text(json.dumps(changed))
    remedy = r"manifest\.digest: got .* again with --force"
    with pytest.raises(StoreError, match=remedy):
        Store.open(folder)
    with pytest.raises(StoreError, match=remedy):
        prepare(source, folder)
    assert prepare(source, folder, force=True).manifest == original.manifest
