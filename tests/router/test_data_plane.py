"""What a router reads before it chooses its engine."""

import shutil
from pathlib import Path

import pytest
from sandbox_processes import PreparedStore

from faasmoe_contracts.store import Store
from faasmoe_router.data_plane import read_model_config
from faasmoe_router.errors import RouterConfigError


@pytest.fixture
def store(prepared_store: PreparedStore, tmp_path: Path) -> Store:
    return Store.open(Path(shutil.copytree(prepared_store("mixtral").path, tmp_path / "store")))


def test_the_config_of_a_model_is_read(store: Store) -> None:
    assert read_model_config(store)["architectures"] == [store.manifest.model.architecture]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param("{", "Expecting property name", id="no JSON"),
        pytest.param("[]", "got list, expected a JSON object", id="no object"),
        pytest.param("[" * 100_000, "recursion", id="nested too deeply"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(store: Store, content: str, error: str) -> None:
    (store.path / "model" / "config.json").write_text(content)
    with pytest.raises(RouterConfigError, match=rf"FAASMOE_STORE: .*config\.json: .*{error}"):
        read_model_config(store)
