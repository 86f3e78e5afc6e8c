import asyncio

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.cache import ObjectCache, ObjectChange, OwnedPods
from faasmoe_operator.kube.types import CONFIG_MAP, MOEMODEL, POD


def test_finds_objects_by_name_and_by_owner() -> None:
    cache = ObjectCache()
    pod = make_object(POD, "a", owner="model-1")
    cache.update(POD, pod)
    cache.update(CONFIG_MAP, make_object(CONFIG_MAP, "a", owner="model-1"))
    assert cache.get(POD, "llm", "a") == pod
    assert cache.get(POD, "other", "a") is None
    assert cache.owned_by("model-1", POD) == [pod]
    assert len(cache.owned_by("model-1")) == 2


def test_finds_pods_by_model_label_whatever_their_owner() -> None:
    cache = ObjectCache()
    pod = make_object(POD, "router-x", owner="replica-set", labels={"faasmoe.dev/model": "m"})
    cache.update(POD, pod)
    assert cache.labelled_with_model("llm", "m", POD) == [pod]
    assert cache.labelled_with_model("other", "m", POD) == []
    cache.delete(POD, pod)
    assert cache.labelled_with_model("llm", "m", POD) == []


@pytest.mark.parametrize("version", [7, 6])
def test_keeps_the_newest_state_whatever_arrives_last(version: int) -> None:
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


def test_a_state_older_than_the_deletion_does_not_bring_an_object_back() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "a", uid="u1", version=5, owner="model-1"))
    assert cache.delete(POD, make_object(POD, "a", uid="u1", version=7))
    assert not cache.update(POD, make_object(POD, "a", uid="u1", version=6, owner="model-1"))
    assert cache.owned_by("model-1") == []


def test_an_object_that_regains_its_label_returns() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "a", uid="u1", version=5))
    cache.delete(POD, make_object(POD, "a", uid="u1", version=6))
    assert cache.update(POD, make_object(POD, "a", uid="u1", version=7))


def test_a_late_deletion_keeps_the_successor_of_the_same_name() -> None:
    cache = ObjectCache()
    old, new = make_object(POD, "a", uid="u1"), make_object(POD, "a", uid="u2")
    cache.update(POD, old)
    cache.update(POD, new)
    assert not cache.delete(POD, old)
    assert cache.get(POD, "llm", "a") == new


def test_a_change_of_owner_updates_the_index() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "a", owner="model-1"))
    cache.update(POD, make_object(POD, "a", owner="model-2"))
    assert cache.owned_by("model-1") == []
    assert len(cache.owned_by("model-2")) == 1


def test_replace_deletes_what_a_list_lacks_in_its_namespace() -> None:
    cache = ObjectCache()
    for name in ("gone", "stays"):
        cache.update(POD, make_object(POD, name, version=5))
    cache.update(POD, make_object(POD, "gone", namespace="other", version=5))
    listed = [make_object(POD, "stays", version=5), make_object(POD, "came", version=7)]
    assert cache.replace(POD, listed, namespace="llm", resource_version="8") == 1
    names = {obj["metadata"]["name"] for obj in cache.list_all(POD)}
    assert names == {"stays", "came", "gone"}
    assert cache.get(POD, "llm", "gone") is None


def test_replace_keeps_what_is_newer_than_the_list() -> None:
    cache = ObjectCache()
    cache.update(POD, make_object(POD, "just-created", version=9))
    assert cache.replace(POD, [], namespace=None, resource_version="8") == 0
    assert cache.get(POD, "llm", "just-created") is not None


@pytest.mark.parametrize("namespace", [None, "llm"])
def test_a_late_response_older_than_the_list_does_not_bring_an_object_back(
    namespace: str | None,
) -> None:
    cache = ObjectCache()
    cache.replace(POD, [], namespace=namespace, resource_version="8")
    assert not cache.update(POD, make_object(POD, "created-and-deleted", version=7))
    assert cache.update(POD, make_object(POD, "created", version=9))


def test_a_forgotten_kind_can_be_listed_again_unchanged() -> None:
    cache, changes = ObjectCache(), list[ObjectChange]()
    pod = make_object(POD, "a", version=5)
    cache.replace(POD, [pod], namespace=None, resource_version="8")
    cache.add_event_handler(changes.append)
    cache.forget(POD)
    assert cache.list_all(POD) == []
    assert changes == [ObjectChange(POD, pod, None)]
    cache.replace(POD, [pod], namespace=None, resource_version="8")
    assert cache.list_all(POD) == [pod]


def test_handlers_get_additions_changes_and_deletions() -> None:
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


def test_drops_managed_fields() -> None:
    cache = ObjectCache()
    pod = make_object(POD, "a")
    pod["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    cache.update(POD, pod)
    found = cache.get(POD, "llm", "a")
    assert found is not None
    assert "managedFields" not in found["metadata"]
    assert "managedFields" in pod["metadata"]


def test_owned_pods_lists_and_notifies_for_one_owner_only() -> None:
    async def scenario() -> None:
        cache = ObjectCache()
        pods = OwnedPods(cache, "model-1")
        n_evaluations = 0

        def has_pods() -> bool:
            nonlocal n_evaluations
            n_evaluations += 1
            return bool(pods.list_oldest_first())

        waiting = asyncio.create_task(pods.wait_for(has_pods))
        await asyncio.sleep(0)
        cache.update(POD, make_object(POD, "other", owner="model-2"))
        await asyncio.sleep(0)
        pods.update(make_object(POD, "mine", owner="model-1"))
        await asyncio.wait_for(waiting, 1)
        assert n_evaluations == 2
        assert [pod["metadata"]["name"] for pod in pods.list_oldest_first()] == ["mine"]
        assert pods.get("llm", "mine") is not None
        assert pods.get("llm", "other") is None

    asyncio.run(scenario())
