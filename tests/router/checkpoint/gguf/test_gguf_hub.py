"""Which GGUF files of a hub repository a name means, and their download, with and without a hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_models import GGUF_FAMILIES, build_model, file_tensors, write_gguf
from hub_server import COMMIT, Hub, running_hub
from huggingface_hub.errors import HTTPError

from faasmoe_router.checkpoint.gguf.hub_files import choose_checkpoint, group_files
from faasmoe_router.checkpoint.hub import HubName
from faasmoe_router.checkpoint.prepare import find_complete_store, prepare
from faasmoe_router.errors import PrepareError

FILES = [
    "README.md",
    "config.json",
    "M-Q8_0.gguf",
    "M-Q4_K_M.gguf",
    "M-UD-Q4_K_XL.gguf",
    "M.Q2_K.gguf",
    "BF16/M-BF16-00001-of-00002.gguf",
    "BF16/M-BF16-00002-of-00002.gguf",
    "mmproj-F16.gguf",
    "M.imatrix.gguf",
    "../up-Q8_0.gguf",
    "/root-Q8_0.gguf",
]


@pytest.mark.parametrize(
    ("source", "repository", "file"),
    [
        ("org/name", "org/name", None),
        ("hf://org/name", "org/name", None),
        ("org/name:Q8_0", "org/name", "Q8_0"),
        ("hf://org/name:sub/m.gguf", "org/name", "sub/m.gguf"),
        ("hf://a/b/c", "a/b/c", None),
    ],
)
def test_names_on_the_hub(source: str, repository: str, file: str | None) -> None:
    assert HubName.of(source) == HubName(repository, file)


@pytest.mark.parametrize(
    "source", ["name", "./a/b", "~/a", "/a/b", "a/b/c", "file:///a/b", "a/m.gguf", "s3://a/b"]
)
def test_other_names_are_local(source: str) -> None:
    assert HubName.of(source) is None


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("Q8_0", ["M-Q8_0.gguf"]),
        ("q4_k_m", ["M-Q4_K_M.gguf"]),
        ("Q2_K", ["M.Q2_K.gguf"]),
        ("UD-Q4_K_XL", ["M-UD-Q4_K_XL.gguf"]),
        ("BF16", ["BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf"]),
        (
            "BF16/M-BF16-00002-of-00002.gguf",
            ["BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf"],
        ),
        ("M-Q4_K_M.gguf", ["M-Q4_K_M.gguf"]),
    ],
)
def test_a_quantisation_or_file_means_one_checkpoint(file: str, chosen: list[str]) -> None:
    files = choose_checkpoint(HubName("org/name", file), group_files(FILES))
    assert list(files) == chosen


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("Q4_K", "'org/name' with 'Q4_K', which is none of its GGUF files, .* M-Q4_K_M.gguf"),
        ("Q8_0.gguf", "with 'Q8_0.gguf', which is none of its GGUF files"),
        ("M", "with 'M', which are 5 checkpoints, expected ORG/NAME:QUANT or ORG/NAME:FILE of"),
        (None, "'org/name', which are 5 checkpoints"),
    ],
)
def test_no_or_several_matches_are_named(file: str | None, message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        choose_checkpoint(HubName("org/name", file), group_files(FILES))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository of GGUF files: two quantisations, one split in a folder of its own."""
    folder = tmp_path / "repository"
    (folder / "Q4_0").mkdir(parents=True)
    family = GGUF_FAMILIES["qwen2moe"]
    model = build_model(family)
    write_gguf(folder / "T-Q8_0.gguf", family, model, file_tensors(family, model, "Q8_0").blocks)
    blocks = file_tensors(family, model, "Q4_0").blocks
    write_gguf(folder / "Q4_0" / "T-Q4_0.gguf", family, model, blocks, split_max_tensors=9)
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub({"acme/T-GGUF": folder}) as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub


@pytest.mark.parametrize(
    ("file", "pattern"), [("Q8_0", "T-Q8_0.gguf"), ("Q4_0", "Q4_0/T-Q4_0-*-of-*.gguf")]
)
def test_a_store_of_the_hub_is_that_of_the_file(
    hub: Hub, folder: Path, tmp_path: Path, file: str, pattern: str
) -> None:
    local = sorted(folder.glob(pattern))
    store = prepare(f"hf://acme/T-GGUF:{file}", tmp_path / "store")
    expected = prepare(str(local[0]), tmp_path / "expected")
    assert store.manifest.files == expected.manifest.files
    model = store.manifest.model
    assert (model.source, model.revision) == (f"hf://acme/T-GGUF:{file}", COMMIT)
    downloads = {path for path in map(_path, hub.requests) if "/resolve/" in path}
    assert {path.partition("/resolve/")[2].partition("/")[2] for path in downloads} == {
        path.relative_to(folder).as_posix() for path in local
    }
    again = find_complete_store(
        f"acme/T-GGUF:{file}", tmp_path / "store", revision=None, dtype=None
    )
    assert again is not None
    with pytest.raises(PrepareError, match="prepared from 'hf://acme"):
        find_complete_store("acme/T-GGUF:Q2_K", tmp_path / "store", revision=None, dtype=None)


def _path(request: str) -> str:
    return request.partition(" ")[2]


def test_files_in_the_cache_are_enough(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("acme/T-GGUF:Q8_0", tmp_path / "first")
    n_requests = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    store = prepare("acme/T-GGUF:Q8_0", tmp_path / "second")
    assert store.manifest.model.revision == COMMIT
    assert len(hub.requests) == n_requests


def test_the_only_checkpoint_needs_no_name(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "T-Q8_0.gguf").unlink()
    assert prepare("acme/T-GGUF", tmp_path / "store").manifest.model.family == "qwen2_moe"


@pytest.mark.usefixtures("hub")
def test_several_checkpoints_are_listed(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"Q4_0/T-Q4_0\.gguf, T-Q8_0\.gguf"):
        prepare("acme/T-GGUF", tmp_path / "store")


@pytest.mark.usefixtures("hub")
def test_an_unreachable_hub_without_a_cache_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HTTPError("refused")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(PrepareError, match="the hub cannot be reached and the local cache"):
        prepare("acme/T-GGUF:Q8_0", tmp_path / "store")
