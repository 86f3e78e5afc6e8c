"""Spec and observed in, list of actions out: creates, nothing to do, updates, not ours, gone."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.diff import (
    REAPPLY_INTERVAL_S,
    ActionPlan,
    ApplyObject,
    CreateObject,
    DeleteObject,
    LastApplied,
    NotOwned,
    ObjectAction,
    ObjectId,
    Owner,
    ReplaceObject,
    desired_hash,
    fingerprint,
    object_id,
    plan_actions,
    with_last_applied_hash,
)
from faasmoe_operator.kube.types import (
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SECRET,
    SERVICE,
    Kind,
    Object,
)

OWNER = Owner("uid-moe", "moe")
NOW = 100.0


def desired_object(kind: Kind, name: str = "moe", **body: Any) -> Object:
    reference = {"kind": "MoEModel", "name": "moe", "uid": OWNER.uid, "controller": True}
    metadata = {"name": name, "namespace": "llm", "ownerReferences": [reference]}
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **body}


def live(intent: Object, **changes: Any) -> Object:
    """What the API server has after an apply, with what it adds."""
    obj = with_last_applied_hash(intent)
    metadata = {**obj["metadata"], "uid": "u1", "resourceVersion": "5", "generation": 1}
    return {**obj, "metadata": metadata, "status": {"phase": "x"}, **changes}


@dataclass
class Case:
    wanted: list[Object] = field(default_factory=list)
    live: list[Object] = field(default_factory=list)
    applied: dict[ObjectId, LastApplied] = field(default_factory=dict)
    prune: bool = True

    def plan(self) -> ActionPlan:
        return plan_actions(
            self.wanted,
            self.live,
            owner=OWNER,
            last_applied=self.applied,
            prune=self.prune,
            now=NOW,
        )


SPEC = {"replicas": 1, "template": {"spec": {"containers": [{"name": "r", "cpu": "1000m"}]}}}
NORMALIZED = {"replicas": 1, "template": {"spec": {"containers": [{"name": "r", "cpu": "1"}]}}}
ROUTER = desired_object(DEPLOYMENT, spec=SPEC)
NOT_OWNED_DEPLOYMENT = make_object(DEPLOYMENT, "moe", owner="somebody")
UNOWNED = make_object(DEPLOYMENT, "moe")
TERMINATING = live(ROUTER)
TERMINATING["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
MAP = desired_object(CONFIG_MAP, data={"a": "1"})


def last_applied(intent: Object, result: Object, *, at: float = 0.0) -> dict[ObjectId, LastApplied]:
    return {object_id(intent): LastApplied(desired_hash(intent), fingerprint(result, intent), at)}


@pytest.mark.parametrize(
    ("case", "actions"),
    [
        pytest.param(Case([ROUTER]), [CreateObject(ROUTER)], id="creates"),
        pytest.param(Case([ROUTER], [live(ROUTER)]), [], id="nothing-to-do"),
        pytest.param(
            Case([MAP], [live(desired_object(CONFIG_MAP, data={"a": "0"}))]),
            [ApplyObject(MAP, live(desired_object(CONFIG_MAP, data={"a": "0"})))],
            id="updates",
        ),
        pytest.param(
            Case([MAP], [live(desired_object(CONFIG_MAP, data={"a": "1", "b": "2"}))]),
            [ApplyObject(MAP, live(desired_object(CONFIG_MAP, data={"a": "1", "b": "2"})))],
            id="takes-away-what-an-earlier-intent-had",
        ),
        pytest.param(
            Case([MAP], [live(MAP, data={"a": "edited"})]),
            [ApplyObject(MAP, live(MAP, data={"a": "edited"}))],
            id="puts-edits-back",
        ),
        pytest.param(Case([MAP], [live(MAP, immutable=False)]), [], id="leaves-additions"),
        pytest.param(
            Case([ROUTER], [live(ROUTER, spec=NORMALIZED)]),
            [ApplyObject(ROUTER, live(ROUTER, spec=NORMALIZED))],
            id="applies-once-what-it-cannot-compare",
        ),
        pytest.param(
            Case(
                [ROUTER],
                [live(ROUTER, spec=NORMALIZED)],
                last_applied(ROUTER, live(ROUTER, spec=NORMALIZED)),
            ),
            [],
            id="knows-the-servers-own-writing",
        ),
        pytest.param(
            Case([ROUTER], [NOT_OWNED_DEPLOYMENT]),
            [NotOwned(NOT_OWNED_DEPLOYMENT, is_terminating=False)],
            id="not-ours",
        ),
        pytest.param(
            Case([ROUTER], [UNOWNED]), [NotOwned(UNOWNED, is_terminating=False)], id="nobodys"
        ),
        pytest.param(Case([ROUTER], [TERMINATING]), [], id="waits-for-what-goes"),
        pytest.param(Case([], [live(MAP)]), [DeleteObject(live(MAP))], id="gone"),
        pytest.param(Case([], [live(MAP)], prune=False), [], id="gone-but-not-yet"),
        pytest.param(Case([], [NOT_OWNED_DEPLOYMENT]), [], id="gone-and-not-ours"),
        pytest.param(Case([], [TERMINATING]), [], id="gone-and-going"),
        pytest.param(
            Case([], [make_object(CONFIG_MAP, "popularity", owner=OWNER.uid)]),
            [],
            id="ours-and-never-planned",
        ),
        pytest.param(Case([], [make_object(POD, "sandbox", owner=OWNER.uid)]), [], id="sandboxes"),
    ],
)
def test_plans(case: Case, actions: list[ObjectAction]) -> None:
    assert list(case.plan().actions) == actions


def test_keeps_the_order_of_making() -> None:
    objects = [desired_object(SERVICE), desired_object(CONFIG_MAP), desired_object(DEPLOYMENT)]
    assert list(Case(objects).plan().actions) == [CreateObject(obj) for obj in objects]


def test_creates_a_secret_once() -> None:
    secret = desired_object(SECRET)
    assert Case([secret]).plan().actions == (CreateObject(secret),)
    known = {object_id(secret): LastApplied(desired_hash(secret), "", 0.0)}
    assert Case([secret], applied=known).plan().actions == ()


def test_does_not_apply_the_same_intent_again_at_once() -> None:
    edited = live(MAP, data={"a": "edited"})
    case = Case([MAP], [edited], last_applied(MAP, live(MAP), at=NOW - 1))
    assert case.plan() == ActionPlan((), requeue_at=NOW - 1 + REAPPLY_INTERVAL_S)


def test_applies_another_intent_at_once() -> None:
    before = desired_object(CONFIG_MAP, data={"a": "0"})
    case = Case([MAP], [live(before)], last_applied(before, live(before), at=NOW))
    assert case.plan().actions == (ApplyObject(MAP, live(before)),)


def a_job(template: str, **changes: Any) -> Object:
    job = desired_object(JOB, spec={"suspend": False}, **changes)
    job["metadata"]["labels"] = {"faasmoe.dev/template": template}
    return job


def with_job_condition(job: Object, how: str) -> Object:
    return live(job, status={"conditions": [{"type": how, "status": "True"}]})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(live(a_job("new")), None, id="as-wanted"),
        pytest.param(live(a_job("old")), ReplaceObject, id="other-pods"),
        pytest.param(
            live(a_job("new"), spec={"suspend": True}), ApplyObject, id="suspended-by-others"
        ),
        pytest.param(with_job_condition(a_job("old"), "Complete"), None, id="done-is-done"),
        pytest.param(
            with_job_condition(a_job("new"), "Failed"), None, id="failed-is-tried-again-elsewhere"
        ),
        pytest.param(
            with_job_condition(a_job("old"), "Failed"), ReplaceObject, id="failed-and-mended"
        ),
    ],
)
def test_a_job_is_replaced_where_others_are_changed(
    found: Object, expected: type[ObjectAction] | None
) -> None:
    actions = Case([a_job("new")], [found]).plan().actions
    assert [type(action) for action in actions] == ([] if expected is None else [expected])


def a_claim(**labels: str) -> Object:
    return make_object(PERSISTENT_VOLUME_CLAIM, "moe-store", labels=dict(labels))


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
    claim = desired_object(PERSISTENT_VOLUME_CLAIM, "moe-store")
    del claim["metadata"]["ownerReferences"]
    (action,) = Case([claim], [a_claim(**labels)]).plan().actions
    assert isinstance(action, NotOwned) is clash


def test_tells_what_a_deleted_namesake_left() -> None:
    left = make_object(DEPLOYMENT, "moe", owner="uid-of-the-old-one")
    left["metadata"]["ownerReferences"][0] |= {"kind": "MoEModel", "name": "moe"}
    assert Case([ROUTER], [left]).plan().actions == (NotOwned(left, is_terminating=True),)
