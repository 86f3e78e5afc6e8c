import asyncio

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.cache import ObjectCache, ObjectChange, OwnedPods
from faasmoe_operator.kube.types import CONFIG_MAP, MOEMODEL, POD


def test_gives_an_object_by_its_name_and_by_its_owner() -> None:
    cache = ObjectCache()
    pod = make_object(POD, "a", owner="model-1")
    cache.update(POD, pod)
    cache.update(CONFIG_MAP, make_object(CONFIG_MAP, "a", owner="model-1"))
    assert cache.get(POD, "llm", "a") == pod
    assert cache.get(POD, "other", "a") is None
    assert cache.owned_by("model-1", POD) == [pod]
    assert len(cache.owned_by("model-1")) == 2


def test_finds_pods_of_a_model_that_something_else_controls() -> None:
    cache = ObjectCache()
    pod = make_object(POD, "router-x", owner="replica-set", labels={"faasmoe.dev/model": "m"})
    cache.update(POD, pod)
    assert cache.labelled_with_model("llm", "m", POD) == [pod]
    assert cache.labelled_with_model("other", "m", POD) == []
    cache.delete(POD, pod)
    assert cache.labelled_with_model("llm", "m", POD) == []


@pytest.mark.parametrize("version", [7, 6])
def test_keeps_the_newest_state_whatever_comes_last(version: int) -> None:
    cache = ObjectCache()
    newest = make_object(POD, "a", version=7, status={"phase": "Running"})
    assert cache.update(POD, newest)
    assert not cache.update(
        POD, make_object(POD, "a", version=version, status={"phase": "Pending"})
    )
    assert cache.get(POD, "llm", "a") == newest


def test_compares_versions_as_numbers() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "a", version=99))
    assert cache.update(POD, make_object(POD, "a", version=100))


def test_nothing_older_than_its_deletion_brings_an_object_back() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "a", uid="u1", version=5, owner="model-1"))
    assert cache.delete(POD, make_object(POD, "a", uid="u1", version=7))
    assert not cache.update(POD, make_object(POD, "a", uid="u1", version=6, owner="model-1"))
    assert cache.owned_by("model-1") == []


def test_an_object_that_gets_its_label_back_is_seen_again() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "a", uid="u1", version=5))
    cache.delete(POD, make_object(POD, "a", uid="u1", version=6))
    assert cache.update(POD, make_object(POD, "a", uid="u1", version=7))


def test_a_late_deletion_leaves_the_successor_of_the_same_name() -> None:
    cache = ObjectCache()
    old, new = make_object(POD, "a", uid="u1"), make_object(POD, "a", uid="u2")
    cache.update(POD, old)
    cache.update(POD, new)
    assert not cache.delete(POD, old)
    assert cache.get(POD, "llm", "a") == new


def test_a_new_owner_takes_the_object_from_the_old_one() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "a", owner="model-1"))
    cache.update(POD, make_object(POD, "a", owner="model-2"))
    assert cache.owned_by("model-1") == []
    assert len(cache.owned_by("model-2")) == 1


def test_a_list_shows_what_a_broken_watch_has_missed() -> None:
    cache = ObjectCache()
    for name in ("gone", "stays"):
        cache.update(POD, make_object(POD, name))
    cache.update(POD, make_object(POD, "gone", namespace="other"))
    known = cache.known_uids(POD, "llm")
    there = [make_object(POD, "stays"), make_object(POD, "came")]
    assert cache.replace(POD, there, known_uids=known) == 1
    names = {obj["metadata"]["name"] for obj in cache.list_all(POD)}
    assert names == {"stays", "came", "gone"}
    assert cache.get(POD, "llm", "gone") is None


def test_a_list_does_not_take_what_came_while_it_was_on_its_way() -> None:
    cache = ObjectCache()
    known = cache.known_uids(POD, None)
    cache.update(POD, make_object(POD, "just-created"))
    assert cache.replace(POD, [], known_uids=known) == 0
    assert cache.get(POD, "llm", "just-created") is not None


def test_tells_what_came_changed_and_went() -> None:
    cache, changes = ObjectCache(), list[ObjectChange]()
    cache.add_event_handler(changes.append)
    first, second = make_object(MOEMODEL, "m"), make_object(MOEMODEL, "m")
    cache.update(MOEMODEL, first)
    cache.update(MOEMODEL, second)
    cache.update(MOEMODEL, first)
    cache.delete(MOEMODEL, second)
    assert changes == [
        ObjectChange(MOEMODEL, None, first),
        ObjectChange(MOEMODEL, first, second),
        ObjectChange(MOEMODEL, second, None),
    ]
    assert changes[-1].object == second


def test_keeps_no_managed_fields() -> None:
    cache = ObjectCache()
    pod = make_object(POD, "a")
    pod["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    cache.update(POD, pod)
    found = cache.get(POD, "llm", "a")
    assert found is not None
    assert "managedFields" not in found["metadata"]
    assert "managedFields" in pod["metadata"]


def test_a_pod_source_shows_one_owners_pods_and_wakes_only_for_them() -> None:
    async def story() -> None:
        cache = ObjectCache()
        source = OwnedPods(cache, "model-1")
        looks = 0

        def came() -> bool:
            nonlocal looks
            looks += 1
            return bool(source.list_oldest_first())

        waiting = asyncio.create_task(source.wait_for(came))
        await asyncio.sleep(0)
        cache.update(POD, make_object(POD, "other", owner="model-2"))
        await asyncio.sleep(0)
        source.update(make_object(POD, "mine", owner="model-1"))
        await asyncio.wait_for(waiting, 1)
        assert looks == 2
        assert [pod["metadata"]["name"] for pod in source.list_oldest_first()] == ["mine"]
        assert source.get("llm", "mine") is not None
        assert source.get("llm", "other") is None

    asyncio.run(story())
