"""Skeletons that a zygote builds for the routers that it forks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sandbox_processes import PreparedStore

from faasmoe_contracts.store import Store
from faasmoe_router.model_loader import build_skeleton
from faasmoe_router.skeletons import Skeleton, SkeletonCache
from faasmoe_transformers.experts_backend import register_implementation


@pytest.fixture
def store(prepared_store: PreparedStore) -> Store:
    register_implementation()
    return prepared_store("gpt_oss")


def test_skeleton_is_taken_once_by_a_store_of_equal_files(store: Store, tmp_path: Path) -> None:
    cache = SkeletonCache()
    cache.prepare(store, torch.float32, build_skeleton)
    copy = Store.open(Path(shutil.copytree(store.path, tmp_path / "copy")))
    assert cache.take(copy, torch.bfloat16) is None
    skeleton = cache.take(copy, torch.float32)
    assert skeleton is not None
    built = build_skeleton(store, torch.float32)
    assert {n: p.shape for n, p in skeleton.model.named_parameters()} == {
        n: p.shape for n, p in built.model.named_parameters()
    }
    assert not skeleton.model.training
    assert cache.take(copy, torch.float32) is None


def test_skeleton_of_other_files_is_not_taken(store: Store, tmp_path: Path) -> None:
    cache = SkeletonCache()
    cache.prepare(store, torch.float32, build_skeleton)
    other = Path(shutil.copytree(store.path, tmp_path / "other"))
    file = other / "model" / "generation_config.json"
    file.write_text(file.read_text().replace(" ", "\t"))
    assert cache.take(Store.open(other), torch.float32) is None


def test_only_the_last_skeletons_are_kept_and_no_threads_are_used(store: Store) -> None:
    seen: list[int] = []

    def build(store: Store, dtype: torch.dtype) -> Skeleton:
        seen.append(torch.get_num_threads())
        return build_skeleton(store, dtype)

    cache, n_threads = SkeletonCache(size=1), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float32):
        cache.prepare(store, dtype, build)
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == n_threads
