"""Stories of one MoEModel over an API server in memory: what is asked of it, and what is said."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from fake_kube_api import FakeKubeApi
from kube_objects import make_object

from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.component_status import RuntimeCounts
from faasmoe_operator.kube.context import OperatorContext
from faasmoe_operator.kube.errors import Forbidden, Invalid, Unavailable
from faasmoe_operator.kube.events import EventRecorder
from faasmoe_operator.kube.manifests import ControlEndpoint, Images, ModelContext
from faasmoe_operator.kube.manifests.names import MODEL_LABEL
from faasmoe_operator.kube.reconciler import RESYNC_PERIOD_S, Reconciler, ReconcileResult
from faasmoe_operator.kube.types import (
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    JOB,
    MOEMODEL,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SECRET,
    SERVICE,
    SERVICE_MONITOR,
    Kind,
    ModelKey,
    Object,
)

KEY = ModelKey("llm", "moe")
ENDED_AT = 1_787_990_400.0  # when jobs end, 2026-08-29T08:00:00Z
SUMMARY = {
    "digest": "sha256:" + "0" * 64,
    "source": "hf://org/moe",
    "family": "qwen2_moe",
    "architecture": "Qwen2MoeForCausalLM",
    "dtype": "bfloat16",
    "hiddenSize": 2048,
    "vocabSize": 1000,
    "maxPositionEmbeddings": 8192,
    "numHiddenLayers": 24,
    "sizeBytes": 1 << 30,
    "routerBytes": 1 << 28,
    "layers": [
        {"count": 24, "numExperts": 60, "topK": 4, "expertBytes": 1 << 20, "sharedBytes": 0}
    ],
}
COUNTS = RuntimeCounts(functions=72, active=1, replicas=1, sandboxes=2, ready=2, generic=1)


class FakeRuntimes:
    """Control cores that count what they are told to."""

    def __init__(self) -> None:
        self.running: dict[ModelKey, ModelContext] = {}
        self.removed: list[tuple[ModelKey, bool]] = []
        self.reported_counts: RuntimeCounts | None = COUNTS
        self.error: Exception | None = None

    async def ensure(self, ctx: ModelContext) -> None:
        if self.error is not None:
            raise self.error
        self.running[ModelKey(ctx.namespace, ctx.name)] = ctx

    async def remove(self, key: ModelKey, *, delete_sandboxes: bool) -> None:
        if self.running.pop(key, None) is not None:
            self.removed.append((key, delete_sandboxes))

    def counts(self, key: ModelKey) -> RuntimeCounts | None:
        return self.reported_counts if key in self.running else None


class Scenario:
    """One operator and one cluster; time stands until it is moved."""

    def __init__(self) -> None:
        self.cache = ObjectCache()
        self.api = FakeKubeApi(self.cache)
        self.runtimes = FakeRuntimes()
        self.now = 1_788_000_000.0
        self.served_apis: frozenset[str] = frozenset()
        self.restart()

    def restart(self) -> None:
        """Begin anew with what a new process would know: nothing but the cache."""
        context = OperatorContext(
            Images("router:1", "expert:1"),
            ControlEndpoint("http://operator:8090", "faasmoe-system", {"app": "operator"}, 8090),
            b"r" * 32,
            served_apis=lambda: self.served_apis,
        )
        self.reconciler = Reconciler(
            self.api,
            self.cache,
            self.runtimes,
            context,
            events=EventRecorder(self.api, instance="operator-0"),
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )

    def apply_model(self, **spec: Any) -> None:
        """A user applies the MoEModel."""
        obj = make_object(MOEMODEL, "moe", uid="uid-moe")
        del obj["metadata"]["resourceVersion"]
        known = self.api.objects.get((MOEMODEL, "llm", "moe"), {})
        self.api.write({**known, **obj, "spec": {"model": {"source": "hf://org/moe"}, **spec}})

    def reconcile(self) -> ReconcileResult:
        return asyncio.run(self.reconciler.reconcile(KEY))

    def reconcile_until_idle(self) -> ReconcileResult:
        """Visit until a visit asks for nothing."""
        for _ in range(10):
            self.api.writes()
            result = self.reconcile()
            if not self.api.requests:
                return result
            self.now += 60
        raise AssertionError(f"does not settle: {self.api.requests}")

    def prepare_store(self) -> None:
        """The Job's pod ends well."""
        self.end_job("Complete", json.dumps({"ok": True, **SUMMARY}))

    def end_job(self, how: str, message: str) -> None:
        job = self.live(JOB, "moe-store")
        pod = make_object(
            POD,
            "moe-store-x",
            uid=f"pod-of-{job['metadata']['uid']}",
            owner=job["metadata"]["uid"],
            labels=job["spec"]["template"]["metadata"]["labels"],
        )
        del pod["metadata"]["resourceVersion"]
        ended = {"exitCode": 0, "message": message, "finishedAt": "2026-09-01T12:00:00Z"}
        pod["status"] = {"containerStatuses": [{"name": "c", "state": {"terminated": ended}}]}
        self.api.write(pod)
        condition = {"type": how, "status": "True", "lastTransitionTime": "2026-08-29T08:00:00Z"}
        self.api.set_status(JOB, "llm", "moe-store", conditions=[condition])

    def start_routers(self, n: int = 1) -> None:
        deployment = self.live(DEPLOYMENT, "moe-router")
        counts = ("replicas", "readyReplicas", "updatedReplicas", "availableReplicas")
        self.api.set_status(
            DEPLOYMENT,
            "llm",
            "moe-router",
            observedGeneration=deployment["metadata"]["generation"],
            **dict.fromkeys(counts, n),
        )

    def serve(self) -> None:
        """All that a cluster does for a model that is asked for."""
        self.reconcile()
        self.prepare_store()
        self.reconcile()
        self.start_routers()
        self.reconcile_until_idle()

    def live(self, kind: Kind, name: str) -> Object:
        return self.api.objects[kind, "llm", name]

    @property
    def status(self) -> Object:
        status: Object = self.live(MOEMODEL, "moe")["status"]
        return status

    def condition(self, kind: str) -> Object:
        return next(c for c in self.status["conditions"] if c["type"] == kind)

    def condition_state(self, kind: str) -> tuple[str, str]:
        condition = self.condition(kind)
        return condition["status"], condition["reason"]

    def events(self) -> list[tuple[str, str]]:
        """Return type and reason of every Event."""
        return [
            (obj["type"], obj["reason"])
            for (kind, _, _), obj in self.api.objects.items()
            if kind == EVENT
        ]


@pytest.fixture
def story() -> Scenario:
    story = Scenario()
    story.apply_model()
    return story


def test_the_first_visit_makes_the_store_and_sets_every_condition(story: Scenario) -> None:
    story.reconcile()
    made = {kind.name for kind, _, _ in story.api.objects}
    assert {"PersistentVolumeClaim", "Job"} <= made
    assert "Deployment" not in made
    assert [c["type"] for c in story.status["conditions"]] == [
        "Ready",
        "StoreReady",
        "RouterReady",
        "FunctionsReady",
        "Active",
        "TenantsReady",
    ]
    assert {c["status"] for c in story.status["conditions"]} == {"Unknown"}
    assert story.condition("Ready")["observedGeneration"] == 1
    assert not story.runtimes.running


def test_serves_once_the_store_is_prepared_and_a_router_answers(story: Scenario) -> None:
    story.reconcile()
    story.prepare_store()
    story.reconcile()
    assert story.condition_state("StoreReady") == ("True", "Prepared")
    assert story.condition_state("RouterReady")[0] == "Unknown"
    assert story.runtimes.running[KEY].summary is not None
    story.start_routers()
    story.reconcile()
    assert story.condition_state("Ready") == ("True", "Ready")
    assert story.status["model"]["layers"] == SUMMARY["layers"]
    assert story.status["functions"] == {"total": 72, "active": 1, "replicas": 1}
    assert story.status["router"]["readyReplicas"] == 1
    assert story.status["url"].startswith("http://moe.llm.svc")


def test_asks_nothing_when_nothing_changes(story: Scenario) -> None:
    story.serve()
    story.api.requests.clear()
    story.now += 1000
    assert story.reconcile() == ReconcileResult(RESYNC_PERIOD_S)
    assert story.api.requests == []


def test_a_new_operator_asks_only_for_secrets_it_cannot_see(story: Scenario) -> None:
    story.serve()
    story.restart()
    story.reconcile()
    assert {verb for verb, _, _ in story.api.writes()} == {"create"}


def test_a_new_operator_says_nothing_new_while_it_reads_back(story: Scenario) -> None:
    story.runtimes.reported_counts = replace(COUNTS, tenant_keys={"acme": 2})
    story.apply_model(tenants=[{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}])
    story.serve()
    before = story.status
    story.restart()
    story.runtimes.reported_counts = None
    story.reconcile()
    assert story.status == before
    story.runtimes.reported_counts = replace(COUNTS, tenant_keys=None)
    story.reconcile()
    assert story.status == before


def test_a_changed_spec_is_applied_where_it_matters(story: Scenario) -> None:
    story.serve()
    story.apply_model(router={"replicas": 2})
    story.api.writes()
    story.reconcile()
    assert ("apply", "Deployment", "moe-router") in story.api.writes()
    assert story.live(DEPLOYMENT, "moe-router")["spec"]["replicas"] == 2
    assert story.condition_state("Ready") == ("Unknown", "Starting")
    assert story.condition("Ready")["observedGeneration"] == 2
    story.start_routers(2)
    story.reconcile()
    assert story.condition_state("Ready") == ("True", "Ready")


def test_puts_foreign_edits_back_but_not_in_a_fight(story: Scenario) -> None:
    story.serve()
    edited = story.live(SERVICE, "moe")

    def edit() -> None:
        story.api.write({**edited, "spec": {**edited["spec"], "type": "NodePort"}})

    edit()
    story.now += 60
    story.reconcile()
    assert story.live(SERVICE, "moe")["spec"]["type"] == "ClusterIP"
    edit()
    again = story.reconcile()
    assert story.live(SERVICE, "moe")["spec"]["type"] == "NodePort"
    assert again.requeue_after_s == pytest.approx(5)
    story.now += 5
    story.reconcile()
    assert story.live(SERVICE, "moe")["spec"]["type"] == "ClusterIP"


def test_takes_out_what_somebody_added_to_a_list(story: Scenario) -> None:
    story.serve()
    edited = story.live(SERVICE, "moe")
    ours = edited["spec"]["ports"]
    edited["spec"]["ports"] = [*ours, {"name": "backdoor", "port": 1234, "protocol": "TCP"}]
    story.api.write(edited)
    story.now += 60
    story.reconcile()
    assert story.live(SERVICE, "moe")["spec"]["ports"] == ours


def test_leaves_what_others_add_to_our_objects(story: Scenario) -> None:
    story.serve()
    service = story.live(SERVICE, "moe")
    service["metadata"]["annotations"] = {**service["metadata"]["annotations"], "team": "a"}
    story.api.write(service)
    story.now += 60
    story.reconcile()
    assert story.api.writes() == []
    assert story.live(SERVICE, "moe")["metadata"]["annotations"]["team"] == "a"


def test_makes_again_what_somebody_deleted(story: Scenario) -> None:
    story.serve()
    story.api.remove(SERVICE, "llm", "moe")
    story.api.writes()
    story.reconcile()
    assert story.api.writes() == [("apply", "Service", "moe")]


def test_deletes_what_is_wanted_no_longer(story: Scenario) -> None:
    keys = {"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}
    story.apply_model(tenants=[keys])
    story.serve()
    assert (SERVICE, "llm", "moe-tenant-acme") in story.api.objects
    story.apply_model()
    story.reconcile()
    names = {(kind, name) for kind, _, name in story.api.objects}
    assert (SERVICE, "moe-tenant-acme") not in names
    assert (CONFIG_MAP, "moe-tenants") not in names


def test_never_touches_an_object_of_another_and_says_so(story: Scenario) -> None:
    other = make_object(SERVICE, "moe", spec={"type": "ExternalName"})
    del other["metadata"]["resourceVersion"]
    story.api.write(other)
    story.reconcile()
    story.prepare_store()
    assert story.reconcile().has_failures
    assert story.live(SERVICE, "moe")["spec"] == {"type": "ExternalName"}
    assert story.condition_state("RouterReady") == ("False", "NotOwned")
    assert story.condition_state("Ready") == ("False", "NotOwned")
    assert (
        "Service llm/moe exists and is not this MoEModel's" in story.condition("Ready")["message"]
    )
    assert ("Warning", "NotOwned") in story.events()


def test_waits_for_what_a_deleted_model_of_its_name_left(story: Scenario) -> None:
    old = make_object(
        JOB, "moe-store", owner="uid-of-the-old-one", labels={"faasmoe.dev/model": "moe"}
    )
    old["metadata"]["ownerReferences"][0] |= {"kind": "MoEModel", "name": "moe"}
    del old["metadata"]["resourceVersion"]
    story.api.write(old)
    assert story.reconcile().has_failures
    assert story.condition_state("StoreReady") == ("Unknown", "WaitingForDeletion")


def test_a_failed_store_is_tried_again_ever_later(story: Scenario) -> None:
    story.reconcile()
    failure = {"ok": False, "reason": "HubUnavailable", "message": "no route to the hub"}
    story.end_job("Failed", json.dumps(failure))
    story.now = ENDED_AT + 1
    visit = story.reconcile()
    assert visit.requeue_after_s == pytest.approx(9)
    assert story.condition_state("StoreReady") == ("False", "HubUnavailable")
    message = story.condition("StoreReady")["message"]
    assert "no route to the hub; check that the cluster's pods reach the hub" in message
    assert ("Warning", "HubUnavailable") in story.events()
    job = story.live(JOB, "moe-store")
    story.now = ENDED_AT + 10
    story.reconcile()
    story.reconcile()
    again = story.live(JOB, "moe-store")
    assert again["metadata"]["uid"] != job["metadata"]["uid"]
    assert story.condition_state("StoreReady") == ("False", "HubUnavailable")
    story.end_job("Failed", json.dumps(failure))
    story.now = ENDED_AT + 11
    assert story.reconcile().requeue_after_s == pytest.approx(19)


def test_a_store_of_another_model_is_not_tried_again_soon(story: Scenario) -> None:
    story.reconcile()
    failure = {"ok": False, "reason": "StoreMismatch", "message": "the claim holds another model"}
    story.end_job("Failed", json.dumps(failure))
    story.now = ENDED_AT + 60
    visit = story.reconcile()
    assert visit.requeue_after_s == pytest.approx(RESYNC_PERIOD_S)
    assert "another store.subPath" in story.condition("StoreReady")["message"]
    assert not story.runtimes.running


def test_a_failed_store_is_tried_at_once_when_the_spec_is_mended(story: Scenario) -> None:
    story.reconcile()
    failure = {"ok": False, "reason": "SourceUnsupported", "message": "no MoE"}
    story.end_job("Failed", json.dumps(failure))
    story.now = ENDED_AT + 60
    story.reconcile()
    story.apply_model(router={"env": [{"name": "HF_ENDPOINT", "value": "https://hub"}]})
    before = story.live(JOB, "moe-store")["metadata"]["uid"]
    story.reconcile()
    story.reconcile()
    assert story.live(JOB, "moe-store")["metadata"]["uid"] != before


def test_the_store_outlives_its_jobs_pod(story: Scenario) -> None:
    story.serve()
    story.api.remove(POD, "llm", "moe-store-x")
    story.restart()
    story.reconcile()
    assert story.condition_state("Ready") == ("True", "Ready")


def test_a_lost_summary_is_found_by_running_the_job_again(story: Scenario) -> None:
    story.reconcile()
    story.prepare_store()
    story.api.remove(POD, "llm", "moe-store-x")
    before = story.live(JOB, "moe-store")["metadata"]["uid"]
    story.reconcile()
    assert story.condition_state("StoreReady") == ("False", "TerminationMessageMissing")
    story.reconcile()
    assert story.live(JOB, "moe-store")["metadata"]["uid"] != before


def test_a_missing_hub_token_is_named(story: Scenario) -> None:
    story.reconcile()
    job = story.live(JOB, "moe-store")
    pod = make_object(
        POD,
        "moe-store-x",
        owner=job["metadata"]["uid"],
        labels=job["spec"]["template"]["metadata"]["labels"],
    )
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}
    pod["status"] = {"containerStatuses": [{"name": "c", "state": {"waiting": waiting}}]}
    del pod["metadata"]["resourceVersion"]
    story.api.write(pod)
    story.reconcile()
    assert story.condition_state("Ready") == ("False", "SecretNotFound")
    assert "no Secret hub" in story.condition("Ready")["message"]


def test_suspended_takes_all_down_and_keeps_the_store(story: Scenario) -> None:
    story.serve()
    sandbox = make_object(
        POD,
        "moe-sandbox-1",
        owner="uid-moe",
        labels={"faasmoe.dev/model": "moe", "app.kubernetes.io/component": "sandbox"},
    )
    del sandbox["metadata"]["resourceVersion"]
    story.api.write(sandbox)
    story.apply_model(suspend=True)
    story.reconcile()
    assert story.runtimes.removed == [(KEY, True)]
    assert story.live(DEPLOYMENT, "moe-router")["spec"]["replicas"] == 0
    assert (POD, "llm", "moe-sandbox-1") not in story.api.objects
    assert (PERSISTENT_VOLUME_CLAIM, "llm", "moe-store") in story.api.objects
    assert story.condition_state("Ready") == ("False", "Suspended")
    assert story.condition_state("StoreReady") == ("True", "Prepared")
    assert story.events().count(("Normal", "Suspended")) == 1
    story.apply_model()
    story.reconcile()
    assert KEY in story.runtimes.running


def test_a_deleted_model_is_left_to_the_garbage_collector(story: Scenario) -> None:
    story.serve()
    story.api.remove(MOEMODEL, "llm", "moe")
    story.api.writes()
    assert story.reconcile() == ReconcileResult(None)
    assert story.runtimes.removed == [(KEY, False)]
    assert story.api.writes() == []


def test_a_model_that_is_going_is_not_worked_on(story: Scenario) -> None:
    story.serve()
    going = story.live(MOEMODEL, "moe")
    going["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    story.api.write(going)
    story.api.writes()
    assert story.reconcile() == ReconcileResult(None)
    assert story.api.writes() == []
    assert not story.runtimes.running


def test_a_model_made_anew_does_not_take_the_memory_of_the_old_one(story: Scenario) -> None:
    story.serve()
    story.api.remove(MOEMODEL, "llm", "moe")
    story.reconcile()
    story.apply_model()
    story.reconcile()
    assert (JOB, "llm", "moe-store") in story.api.objects


def test_an_invalid_spec_is_said_and_changes_nothing(story: Scenario) -> None:
    story.apply_model(granularity={"expertsPerFunction": -1})
    assert story.reconcile() == ReconcileResult(RESYNC_PERIOD_S)
    assert story.condition_state("Ready") == ("False", "SpecInvalid")
    assert "granularity" in story.condition("Ready")["message"]
    assert story.api.writes()[0] == ("patch_status", "MoEModel", "moe")
    assert story.events() == [("Warning", "SpecInvalid")]


def test_functions_that_cannot_be_planned_are_named(story: Scenario) -> None:
    story.runtimes.error = PlanError("spec.granularity.expertsPerFunction: got 100")
    story.reconcile()
    story.prepare_store()
    story.reconcile()
    assert story.condition_state("FunctionsReady") == ("False", "GranularityInvalid")
    assert story.condition_state("Ready")[0] == "False"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Forbidden("exceeded quota: q", status=403, reason="Forbidden"), "QuotaExceeded"),
        (Forbidden("user cannot create", status=403, reason="Forbidden"), "Forbidden"),
        (Invalid("spec: no such field", status=422, reason="Invalid"), "ObjectRejected"),
    ],
)
def test_what_the_api_refuses_is_said_and_tried_again(
    story: Scenario, error: Forbidden | Invalid, reason: str
) -> None:
    story.api.errors["apply", PERSISTENT_VOLUME_CLAIM] = error
    assert story.reconcile().has_failures
    assert story.condition_state("StoreReady") == ("False", reason)
    assert (JOB, "llm", "moe-store") in story.api.objects
    story.api.errors.clear()
    assert not story.reconcile().has_failures
    assert story.condition_state("StoreReady")[0] == "Unknown"


def test_an_api_server_that_is_away_is_nobodys_fault(story: Scenario) -> None:
    story.api.errors["apply", JOB] = Unavailable("away", status=503)
    with pytest.raises(Unavailable):
        story.reconcile()
    assert "status" not in story.live(MOEMODEL, "moe")


def test_a_secret_that_a_pod_misses_is_made_again(story: Scenario) -> None:
    story.serve()
    (secret,) = [name for kind, _, name in story.api.objects if kind == SECRET]
    story.api.remove(SECRET, "llm", secret)
    pod = make_object(
        POD,
        "moe-router-1",
        owner="rs",
        labels={"faasmoe.dev/model": "moe", "app.kubernetes.io/component": "router"},
    )
    waiting = {"reason": "CreateContainerConfigError", "message": f'secret "{secret}" not found'}
    pod["status"] = {"containerStatuses": [{"name": "r", "state": {"waiting": waiting}}]}
    del pod["metadata"]["resourceVersion"]
    story.api.write(pod)
    story.reconcile()
    story.reconcile()
    assert (SECRET, "llm", secret) in story.api.objects


def test_takes_an_api_into_use_as_soon_as_it_is_served(story: Scenario) -> None:
    story.apply_model(monitoring={"serviceMonitor": {}})
    story.serve()
    assert story.condition_state("RouterReady") == ("False", "CRDNotInstalled")
    assert "monitoring.coreos.com/v1" in story.condition("Ready")["message"]

    story.served_apis = frozenset({SERVICE_MONITOR.api_version})
    story.reconcile_until_idle()
    assert story.condition_state("Ready") == ("True", "Ready")
    assert story.live(SERVICE_MONITOR, "moe-router")["spec"]["targetLabels"] == [MODEL_LABEL]


def test_tells_counts_seldom_and_changes_of_state_at_once(story: Scenario) -> None:
    story.serve()
    story.runtimes.reported_counts = replace(COUNTS, replicas=2)
    story.reconcile()
    assert story.status["functions"]["replicas"] == 2
    story.now += 1
    story.runtimes.reported_counts = replace(COUNTS, replicas=3)
    assert story.reconcile().requeue_after_s == pytest.approx(9)
    assert story.status["functions"]["replicas"] == 2
    story.runtimes.reported_counts = replace(COUNTS, active=0, replicas=0)
    story.reconcile()
    assert story.condition_state("Active") == ("False", "NoTraffic")
    assert story.status["functions"]["active"] == 0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (None, ("Unknown", "WaitingForRouter")),
        ({}, ("False", "KeysMissing")),
        ({"acme": 0}, ("False", "KeysMissing")),
        ({"acme": 2}, ("True", "KeysFound")),
    ],
)
def test_tenants_are_ready_when_routers_know_their_keys(
    story: Scenario, keys: dict[str, int] | None, expected: tuple[str, str]
) -> None:
    story.runtimes.reported_counts = replace(COUNTS, tenant_keys=keys)
    story.apply_model(tenants=[{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}])
    story.serve()
    assert story.condition_state("TenantsReady") == expected
    assert story.condition_state("Ready")[0] == expected[0]


def test_tenants_endpoints_are_in_the_status(story: Scenario) -> None:
    story.runtimes.reported_counts = replace(COUNTS, tenant_keys={"acme": 2})
    story.apply_model(tenants=[{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}])
    story.serve()
    (tenant,) = story.status["tenants"]
    assert (tenant["name"], tenant["keys"]) == ("acme", 2)
    assert tenant["url"].endswith("/acme/v1")
