"""plan_actions: which action follows from desired, live and last applied objects."""

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


def live(desired: Object, **changes: Any) -> Object:
    """Return the live object after an apply, with server-set fields."""
    obj = with_last_applied_hash(desired)
    metadata = {**obj["metadata"], "uid": "u1", "resourceVersion": "5", "generation": 1}
    return {**obj, "metadata": metadata, "status": {"phase": "x"}, **changes}


@dataclass
class Case:
    desired: list[Object] = field(default_factory=list)
    live: list[Object] = field(default_factory=list)
    applied: dict[ObjectId, LastApplied] = field(default_factory=dict)
    prune: bool = True

    def plan(self) -> ActionPlan:
        return plan_actions(
            self.desired,
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


def last_applied(
    desired: Object, result: Object, *, at: float = 0.0
) -> dict[ObjectId, LastApplied]:
    return {
        object_id(desired): LastApplied(desired_hash(desired), fingerprint(result, desired), at)
    }


@pytest.mark.parametrize(
    ("case", "actions"),
    [
        pytest.param(Case([ROUTER]), [CreateObject(ROUTER)], id="creates"),
        pytest.param(Case([ROUTER], [live(ROUTER)]), [], id="up-to-date"),
        pytest.param(
            Case([MAP], [live(desired_object(CONFIG_MAP, data={"a": "0"}))]),
            [ApplyObject(MAP, live(desired_object(CONFIG_MAP, data={"a": "0"})))],
            id="updates",
        ),
        pytest.param(
            Case([MAP], [live(desired_object(CONFIG_MAP, data={"a": "1", "b": "2"}))]),
            [ApplyObject(MAP, live(desired_object(CONFIG_MAP, data={"a": "1", "b": "2"})))],
            id="removes-earlier-fields",
        ),
        pytest.param(
            Case([MAP], [live(MAP, data={"a": "edited"})]),
            [ApplyObject(MAP, live(MAP, data={"a": "edited"}))],
            id="reverts-edits",
        ),
        pytest.param(Case([MAP], [live(MAP, immutable=False)]), [], id="keeps-additions"),
        pytest.param(
            Case([ROUTER], [live(ROUTER, spec=NORMALIZED)]),
            [ApplyObject(ROUTER, live(ROUTER, spec=NORMALIZED))],
            id="applies-once-if-not-comparable",
        ),
        pytest.param(
            Case(
                [ROUTER],
                [live(ROUTER, spec=NORMALIZED)],
                last_applied(ROUTER, live(ROUTER, spec=NORMALIZED)),
            ),
            [],
            id="accepts-normalized-values",
        ),
        pytest.param(
            Case([ROUTER], [NOT_OWNED_DEPLOYMENT]),
            [NotOwned(NOT_OWNED_DEPLOYMENT, is_terminating=False)],
            id="not-owned",
        ),
        pytest.param(
            Case([ROUTER], [UNOWNED]), [NotOwned(UNOWNED, is_terminating=False)], id="without-owner"
        ),
        pytest.param(Case([ROUTER], [TERMINATING]), [], id="waits-for-terminating"),
        pytest.param(Case([], [live(MAP)]), [DeleteObject(live(MAP))], id="prunes"),
        pytest.param(Case([], [live(MAP)], prune=False), [], id="does-not-prune"),
        pytest.param(Case([], [NOT_OWNED_DEPLOYMENT]), [], id="prunes-only-owned"),
        pytest.param(Case([], [TERMINATING]), [], id="prunes-no-terminating"),
        pytest.param(
            Case([], [make_object(CONFIG_MAP, "popularity", owner=OWNER.uid)]),
            [],
            id="prunes-only-applied",
        ),
        pytest.param(Case([], [make_object(POD, "sandbox", owner=OWNER.uid)]), [], id="sandboxes"),
    ],
)
def test_plan_actions_by_live_state(case: Case, actions: list[ObjectAction]) -> None:
    assert list(case.plan().actions) == actions


def test_actions_keep_the_order_of_desired_objects() -> None:
    objects = [desired_object(SERVICE), desired_object(CONFIG_MAP), desired_object(DEPLOYMENT)]
    assert list(Case(objects).plan().actions) == [CreateObject(obj) for obj in objects]


def test_creates_a_secret_only_once() -> None:
    secret = desired_object(SECRET)
    assert Case([secret]).plan().actions == (CreateObject(secret),)
    known = {object_id(secret): LastApplied(desired_hash(secret), "", 0.0)}
    assert Case([secret], applied=known).plan().actions == ()


def test_does_not_reapply_the_same_desired_state_at_once() -> None:
    edited = live(MAP, data={"a": "edited"})
    case = Case([MAP], [edited], last_applied(MAP, live(MAP), at=NOW - 1))
    assert case.plan() == ActionPlan((), requeue_at=NOW - 1 + REAPPLY_INTERVAL_S)


def test_applies_a_changed_desired_state_at_once() -> None:
    before = desired_object(CONFIG_MAP, data={"a": "0"})
    case = Case([MAP], [live(before)], last_applied(before, live(before), at=NOW))
    assert case.plan().actions == (ApplyObject(MAP, live(before)),)


def make_job(template: str, **changes: Any) -> Object:
    job = desired_object(JOB, spec={"suspend": False}, **changes)
    job["metadata"]["labels"] = {"faasmoe.dev/template": template}
    return job


def with_job_condition(job: Object, type_: str) -> Object:
    return live(job, status={"conditions": [{"type": type_, "status": "True"}]})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(live(make_job("new")), None, id="unchanged"),
        pytest.param(live(make_job("old")), ReplaceObject, id="changed-template"),
        pytest.param(
            live(make_job("new"), spec={"suspend": True}), ApplyObject, id="suspended-by-others"
        ),
        pytest.param(with_job_condition(make_job("old"), "Complete"), None, id="complete-stays"),
        pytest.param(
            with_job_condition(make_job("new"), "Failed"),
            None,
            id="failed-is-retried-by-the-planner",
        ),
        pytest.param(
            with_job_condition(make_job("old"), "Failed"),
            ReplaceObject,
            id="failed-with-changed-template",
        ),
    ],
)
def test_job_actions_by_live_state(found: Object, expected: type[ObjectAction] | None) -> None:
    actions = Case([make_job("new")], [found]).plan().actions
    assert [type(action) for action in actions] == ([] if expected is None else [expected])


def make_claim(**labels: str) -> Object:
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
def test_a_retained_claim_is_adopted(labels: dict[str, str], clash: bool) -> None:
    claim = desired_object(PERSISTENT_VOLUME_CLAIM, "moe-store")
    del claim["metadata"]["ownerReferences"]
    (action,) = Case([claim], [make_claim(**labels)]).plan().actions
    assert isinstance(action, NotOwned) is clash


def test_detects_objects_of_a_deleted_model_of_the_same_name() -> None:
    left = make_object(DEPLOYMENT, "moe", owner="uid-of-the-old-one")
    left["metadata"]["ownerReferences"][0] |= {"kind": "MoEModel", "name": "moe"}
    assert Case([ROUTER], [left]).plan().actions == (NotOwned(left, is_terminating=True),)
