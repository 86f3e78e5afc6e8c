"""Spec and observed in, list of actions out: creates, nothing to do, updates, not ours, gone."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from kube_objects import an_object

from faasmoe_operator.kube.actions import (
    REAPPLY_INTERVAL_S,
    Action,
    Actions,
    Applied,
    Apply,
    Create,
    Delete,
    NameClash,
    ObjectId,
    Replace,
    object_id,
    plan_actions,
)
from faasmoe_operator.kube.intent import fingerprint, intent_hash, stamped
from faasmoe_operator.kube.kinds import (
    CLAIM,
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    POD,
    SECRET,
    SERVICE,
    Kind,
    Object,
)
from faasmoe_operator.kube.ownership import Owner

OWNER = Owner("uid-moe", "moe")
NOW = 100.0


def wanted(kind: Kind, name: str = "moe", **body: Any) -> Object:
    reference = {"kind": "MoEModel", "name": "moe", "uid": OWNER.uid, "controller": True}
    metadata = {"name": name, "namespace": "llm", "ownerReferences": [reference]}
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **body}


def live(intent: Object, **changes: Any) -> Object:
    """What the API server has after an apply, with what it adds."""
    obj = stamped(intent)
    metadata = {**obj["metadata"], "uid": "u1", "resourceVersion": "5", "generation": 1}
    return {**obj, "metadata": metadata, "status": {"phase": "x"}, **changes}


@dataclass
class Case:
    wanted: list[Object] = field(default_factory=list)
    live: list[Object] = field(default_factory=list)
    applied: dict[ObjectId, Applied] = field(default_factory=dict)
    prune: bool = True

    def plan(self) -> Actions:
        return plan_actions(
            self.wanted, self.live, owner=OWNER, applied=self.applied, prune=self.prune, now=NOW
        )


SPEC = {"replicas": 1, "template": {"spec": {"containers": [{"name": "r", "cpu": "1000m"}]}}}
NORMALIZED = {"replicas": 1, "template": {"spec": {"containers": [{"name": "r", "cpu": "1"}]}}}
ROUTER = wanted(DEPLOYMENT, spec=SPEC)
OTHERS = an_object(DEPLOYMENT, "moe", owner="somebody")
UNOWNED = an_object(DEPLOYMENT, "moe")
GOING = live(ROUTER)
GOING["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
MAP = wanted(CONFIG_MAP, data={"a": "1"})


def remembered(intent: Object, result: Object, *, at: float = 0.0) -> dict[ObjectId, Applied]:
    return {object_id(intent): Applied(intent_hash(intent), fingerprint(result, intent), at)}


@pytest.mark.parametrize(
    ("case", "actions"),
    [
        pytest.param(Case([ROUTER]), [Create(ROUTER)], id="creates"),
        pytest.param(Case([ROUTER], [live(ROUTER)]), [], id="nothing-to-do"),
        pytest.param(
            Case([MAP], [live(wanted(CONFIG_MAP, data={"a": "0"}))]),
            [Apply(MAP, live(wanted(CONFIG_MAP, data={"a": "0"})))],
            id="updates",
        ),
        pytest.param(
            Case([MAP], [live(wanted(CONFIG_MAP, data={"a": "1", "b": "2"}))]),
            [Apply(MAP, live(wanted(CONFIG_MAP, data={"a": "1", "b": "2"})))],
            id="takes-away-what-an-earlier-intent-had",
        ),
        pytest.param(
            Case([MAP], [live(MAP, data={"a": "edited"})]),
            [Apply(MAP, live(MAP, data={"a": "edited"}))],
            id="puts-edits-back",
        ),
        pytest.param(Case([MAP], [live(MAP, immutable=False)]), [], id="leaves-additions"),
        pytest.param(
            Case([ROUTER], [live(ROUTER, spec=NORMALIZED)]),
            [Apply(ROUTER, live(ROUTER, spec=NORMALIZED))],
            id="applies-once-what-it-cannot-compare",
        ),
        pytest.param(
            Case(
                [ROUTER],
                [live(ROUTER, spec=NORMALIZED)],
                remembered(ROUTER, live(ROUTER, spec=NORMALIZED)),
            ),
            [],
            id="knows-the-servers-own-writing",
        ),
        pytest.param(Case([ROUTER], [OTHERS]), [NameClash(OTHERS, going=False)], id="not-ours"),
        pytest.param(Case([ROUTER], [UNOWNED]), [NameClash(UNOWNED, going=False)], id="nobodys"),
        pytest.param(Case([ROUTER], [GOING]), [], id="waits-for-what-goes"),
        pytest.param(Case([], [live(MAP)]), [Delete(live(MAP))], id="gone"),
        pytest.param(Case([], [live(MAP)], prune=False), [], id="gone-but-not-yet"),
        pytest.param(Case([], [OTHERS]), [], id="gone-and-not-ours"),
        pytest.param(Case([], [GOING]), [], id="gone-and-going"),
        pytest.param(
            Case([], [an_object(CONFIG_MAP, "popularity", owner=OWNER.uid)]),
            [],
            id="ours-and-never-planned",
        ),
        pytest.param(Case([], [an_object(POD, "sandbox", owner=OWNER.uid)]), [], id="sandboxes"),
    ],
)
def test_plans(case: Case, actions: list[Action]) -> None:
    assert list(case.plan().actions) == actions


def test_keeps_the_order_of_making() -> None:
    objects = [wanted(SERVICE), wanted(CONFIG_MAP), wanted(DEPLOYMENT)]
    assert list(Case(objects).plan().actions) == [Create(obj) for obj in objects]


def test_creates_a_secret_once() -> None:
    secret = wanted(SECRET)
    assert Case([secret]).plan().actions == (Create(secret),)
    known = {object_id(secret): Applied(intent_hash(secret), "", 0.0)}
    assert Case([secret], applied=known).plan().actions == ()


def test_does_not_apply_the_same_intent_again_at_once() -> None:
    edited = live(MAP, data={"a": "edited"})
    case = Case([MAP], [edited], remembered(MAP, live(MAP), at=NOW - 1))
    assert case.plan() == Actions((), again_at=NOW - 1 + REAPPLY_INTERVAL_S)


def test_applies_another_intent_at_once() -> None:
    before = wanted(CONFIG_MAP, data={"a": "0"})
    case = Case([MAP], [live(before)], remembered(before, live(before), at=NOW))
    assert case.plan().actions == (Apply(MAP, live(before)),)


def a_job(template: str, **changes: Any) -> Object:
    job = wanted(JOB, spec={"suspend": False}, **changes)
    job["metadata"]["labels"] = {"faasmoe.dev/template": template}
    return job


def ended(job: Object, how: str) -> Object:
    return live(job, status={"conditions": [{"type": how, "status": "True"}]})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(live(a_job("new")), None, id="as-wanted"),
        pytest.param(live(a_job("old")), Replace, id="other-pods"),
        pytest.param(live(a_job("new"), spec={"suspend": True}), Apply, id="suspended-by-others"),
        pytest.param(ended(a_job("old"), "Complete"), None, id="done-is-done"),
        pytest.param(ended(a_job("new"), "Failed"), None, id="failed-is-tried-again-elsewhere"),
        pytest.param(ended(a_job("old"), "Failed"), Replace, id="failed-and-mended"),
    ],
)
def test_a_job_is_replaced_where_others_are_changed(
    found: Object, expected: type[Action] | None
) -> None:
    actions = Case([a_job("new")], [found]).plan().actions
    assert [type(action) for action in actions] == ([] if expected is None else [expected])


def a_claim(**labels: str) -> Object:
    return an_object(CLAIM, "moe-store", labels=dict(labels))


@pytest.mark.parametrize(
    ("labels", "clash"),
    [
        (
            {
                "app.kubernetes.io/managed-by": "faasmoe-operator",
                "faasmoe.dev/model": "moe",
            },
            False,
        ),
        ({"app.kubernetes.io/managed-by": "Helm", "faasmoe.dev/model": "moe"}, True),
        ({"app.kubernetes.io/managed-by": "faasmoe-operator", "faasmoe.dev/model": "b"}, True),
        ({}, True),
    ],
)
def test_a_claim_that_outlived_its_model_is_taken_up_again(
    labels: dict[str, str], clash: bool
) -> None:
    claim = wanted(CLAIM, "moe-store")
    del claim["metadata"]["ownerReferences"]
    (action,) = Case([claim], [a_claim(**labels)]).plan().actions
    assert isinstance(action, NameClash) is clash


def test_tells_what_a_deleted_namesake_left() -> None:
    left = an_object(DEPLOYMENT, "moe", owner="uid-of-the-old-one")
    left["metadata"]["ownerReferences"][0] |= {"kind": "MoEModel", "name": "moe"}
    assert Case([ROUTER], [left]).plan().actions == (NameClash(left, going=True),)
