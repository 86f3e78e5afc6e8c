"""Reconciler over an in-memory API server: requests, conditions and status of one MoEModel."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from kube_objects import make_object
from reconciler_scenario import COUNTS, ENDED_AT, KEY, SUMMARY, ReconcilerScenario

from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube.component_status import PROVISIONING_GRACE_S
from faasmoe_operator.kube.errors import Forbidden, Invalid, NamespaceTerminating, Unavailable
from faasmoe_operator.kube.manifests.names import MODEL_LABEL
from faasmoe_operator.kube.reconciler import PARALLEL_REQUESTS, RESYNC_PERIOD_S, ReconcileResult
from faasmoe_operator.kube.types import (
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    MOEMODEL,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SECRET,
    SERVICE,
    SERVICE_MONITOR,
    Kind,
    Object,
)


@pytest.fixture
def scenario() -> ReconcilerScenario:
    scenario = ReconcilerScenario()
    scenario.apply_model()
    return scenario


def test_the_first_reconcile_creates_the_store_and_sets_all_conditions(
    scenario: ReconcilerScenario,
) -> None:
    scenario.reconcile()
    made = {kind.name for kind, _, _ in scenario.api.objects}
    assert {"PersistentVolumeClaim", "Job"} <= made
    assert "Deployment" not in made
    assert [c["type"] for c in scenario.status["conditions"]] == [
        "Ready",
        "StoreReady",
        "RouterReady",
        "FunctionsReady",
        "Active",
        "TenantsReady",
    ]
    assert {c["status"] for c in scenario.status["conditions"]} == {"Unknown"}
    assert scenario.condition("Ready")["observedGeneration"] == 1
    assert not scenario.runtimes.running


def test_is_ready_once_the_store_is_prepared_and_a_router_answers(
    scenario: ReconcilerScenario,
) -> None:
    scenario.reconcile()
    scenario.prepare_store()
    scenario.reconcile()
    assert scenario.condition_state("StoreReady") == ("True", "Prepared")
    assert scenario.condition_state("RouterReady")[0] == "Unknown"
    assert scenario.runtimes.running[KEY].summary is not None
    scenario.start_routers()
    scenario.reconcile()
    assert scenario.condition_state("Ready") == ("True", "Ready")
    assert scenario.status["model"]["layers"] == SUMMARY["layers"]
    assert scenario.status["functions"] == {"total": 72, "active": 1, "replicas": 1}
    assert scenario.status["router"]["readyReplicas"] == 1
    assert scenario.status["url"].startswith("http://moe.llm.svc")


def test_sends_no_request_when_nothing_changes(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.api.requests.clear()
    scenario.now += 1000
    assert scenario.reconcile() == ReconcileResult(RESYNC_PERIOD_S)
    assert scenario.api.requests == []


def test_a_new_operator_only_creates_secrets_again(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.restart()
    scenario.reconcile()
    assert {verb for verb, _, _ in scenario.api.writes()} == {"create"}


def test_a_new_operator_keeps_conditions_while_it_restores_runtimes(
    scenario: ReconcilerScenario,
) -> None:
    scenario.runtimes.reported_counts = replace(COUNTS, tenant_keys={"acme": 2})
    scenario.apply_model(tenants=[{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}])
    scenario.serve()
    before = scenario.status
    scenario.restart()
    scenario.runtimes.reported_counts = None
    scenario.reconcile()
    assert scenario.status == before
    scenario.runtimes.reported_counts = replace(COUNTS, tenant_keys=None)
    scenario.reconcile()
    assert scenario.status == before


def test_a_changed_spec_is_applied_only_to_affected_objects(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.apply_model(router={"replicas": 2})
    scenario.api.writes()
    scenario.reconcile()
    assert ("apply", "Deployment", "moe-router") in scenario.api.writes()
    assert scenario.live(DEPLOYMENT, "moe-router")["spec"]["replicas"] == 2
    assert scenario.condition_state("Ready") == ("Unknown", "Starting")
    assert scenario.condition("Ready")["observedGeneration"] == 2
    scenario.start_routers(2)
    scenario.reconcile()
    assert scenario.condition_state("Ready") == ("True", "Ready")


def test_reverts_edits_of_others_with_a_delay(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    edited = scenario.live(SERVICE, "moe")

    def edit() -> None:
        scenario.api.write({**edited, "spec": {**edited["spec"], "type": "NodePort"}})

    edit()
    scenario.now += 60
    scenario.reconcile()
    assert scenario.live(SERVICE, "moe")["spec"]["type"] == "ClusterIP"
    edit()
    again = scenario.reconcile()
    assert scenario.live(SERVICE, "moe")["spec"]["type"] == "NodePort"
    assert again.requeue_after_s == pytest.approx(5)
    scenario.now += 5
    scenario.reconcile()
    assert scenario.live(SERVICE, "moe")["spec"]["type"] == "ClusterIP"


def test_removes_entries_that_others_added_to_a_list(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    edited = scenario.live(SERVICE, "moe")
    ours = edited["spec"]["ports"]
    edited["spec"]["ports"] = [*ours, {"name": "backdoor", "port": 1234, "protocol": "TCP"}]
    scenario.api.write(edited)
    scenario.now += 60
    scenario.reconcile()
    assert scenario.live(SERVICE, "moe")["spec"]["ports"] == ours


def test_keeps_labels_and_fields_that_others_added(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    service = scenario.live(SERVICE, "moe")
    service["metadata"]["annotations"] = {**service["metadata"]["annotations"], "team": "a"}
    scenario.api.write(service)
    scenario.now += 60
    scenario.reconcile()
    assert scenario.api.writes() == []
    assert scenario.live(SERVICE, "moe")["metadata"]["annotations"]["team"] == "a"


def test_recreates_deleted_objects(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.api.remove(SERVICE, "llm", "moe")
    scenario.api.writes()
    scenario.reconcile()
    assert scenario.api.writes() == [("apply", "Service", "moe")]


def test_deletes_objects_that_are_no_longer_desired(scenario: ReconcilerScenario) -> None:
    keys = {"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}
    scenario.apply_model(tenants=[keys])
    scenario.serve()
    assert (SERVICE, "llm", "moe-tenant-acme") in scenario.api.objects
    scenario.apply_model()
    scenario.reconcile()
    names = {(kind, name) for kind, _, name in scenario.api.objects}
    assert (SERVICE, "moe-tenant-acme") not in names
    assert (CONFIG_MAP, "moe-tenants") not in names


def test_reports_and_never_changes_an_object_it_does_not_own(scenario: ReconcilerScenario) -> None:
    other = make_object(SERVICE, "moe", spec={"type": "ExternalName"})
    del other["metadata"]["resourceVersion"]
    scenario.api.write(other)
    scenario.reconcile()
    scenario.prepare_store()
    assert scenario.reconcile().has_failures
    assert scenario.live(SERVICE, "moe")["spec"] == {"type": "ExternalName"}
    assert scenario.condition_state("RouterReady") == ("False", "NotOwned")
    assert scenario.condition_state("Ready") == ("False", "NotOwned")
    assert (
        "Service llm/moe already exists and is not owned by this MoEModel"
        in scenario.condition("Ready")["message"]
    )
    assert ("Warning", "NotOwned") in scenario.events()


def test_waits_for_objects_of_a_deleted_model_of_the_same_name(
    scenario: ReconcilerScenario,
) -> None:
    old = make_object(
        JOB, "moe-store", owner="uid-of-the-old-one", labels={"faasmoe.dev/model": "moe"}
    )
    old["metadata"]["ownerReferences"][0] |= {"kind": "MoEModel", "name": "moe"}
    del old["metadata"]["resourceVersion"]
    scenario.api.write(old)
    assert scenario.reconcile().has_failures
    assert scenario.condition_state("StoreReady") == ("Unknown", "WaitingForDeletion")


def test_a_failed_store_job_is_retried_with_back_off(scenario: ReconcilerScenario) -> None:
    scenario.reconcile()
    failure = {"ok": False, "reason": "HubUnavailable", "message": "no route to the hub"}
    scenario.end_job("Failed", json.dumps(failure))
    scenario.now = ENDED_AT + 1
    result = scenario.reconcile()
    assert result.requeue_after_s == pytest.approx(9)
    assert scenario.condition_state("StoreReady") == ("False", "HubUnavailable")
    message = scenario.condition("StoreReady")["message"]
    assert "no route to the hub; check that the cluster's pods reach the hub" in message
    assert ("Warning", "HubUnavailable") in scenario.events()
    job = scenario.live(JOB, "moe-store")
    scenario.now = ENDED_AT + 10
    scenario.reconcile()
    scenario.reconcile()
    again = scenario.live(JOB, "moe-store")
    assert again["metadata"]["uid"] != job["metadata"]["uid"]
    assert scenario.condition_state("StoreReady") == ("False", "HubUnavailable")
    scenario.end_job("Failed", json.dumps(failure))
    scenario.now = ENDED_AT + 11
    assert scenario.reconcile().requeue_after_s == pytest.approx(19)


def test_a_claim_that_is_provisioned_soon_causes_no_warning(scenario: ReconcilerScenario) -> None:
    scenario.reconcile()
    job = scenario.live(JOB, "moe-store")
    labels = job["spec"]["template"]["metadata"]["labels"]
    pod = make_object(POD, "moe-store-x", owner=job["metadata"]["uid"], labels=labels)
    del pod["metadata"]["resourceVersion"]
    unbound = {
        "type": "PodScheduled",
        "status": "False",
        "message": "pod has unbound immediate PersistentVolumeClaims",
        "lastTransitionTime": datetime.fromtimestamp(scenario.now, UTC).isoformat(),
    }
    pod["status"] = {"phase": "Pending", "conditions": [unbound]}
    scenario.api.write(pod)
    scenario.reconcile()
    scenario.now += 10
    assert scenario.reconcile().requeue_after_s == pytest.approx(PROVISIONING_GRACE_S - 10)
    assert scenario.condition_state("StoreReady") == ("Unknown", "Preparing")
    assert ("Warning", "Unschedulable") not in scenario.events()
    scenario.now += PROVISIONING_GRACE_S - 10
    scenario.reconcile()
    assert scenario.condition_state("StoreReady") == ("False", "Unschedulable")
    assert ("Warning", "Unschedulable") in scenario.events()


def test_a_store_mismatch_is_retried_rarely(scenario: ReconcilerScenario) -> None:
    scenario.reconcile()
    failure = {"ok": False, "reason": "StoreMismatch", "message": "the claim holds another model"}
    scenario.end_job("Failed", json.dumps(failure))
    scenario.now = ENDED_AT + 60
    result = scenario.reconcile()
    assert result.requeue_after_s == pytest.approx(RESYNC_PERIOD_S)
    assert "another store.subPath" in scenario.condition("StoreReady")["message"]
    assert not scenario.runtimes.running


def test_a_failed_store_job_is_retried_at_once_after_a_spec_change(
    scenario: ReconcilerScenario,
) -> None:
    scenario.reconcile()
    failure = {"ok": False, "reason": "SourceUnsupported", "message": "no MoE"}
    scenario.end_job("Failed", json.dumps(failure))
    scenario.now = ENDED_AT + 60
    scenario.reconcile()
    scenario.apply_model(router={"env": [{"name": "HF_ENDPOINT", "value": "https://hub"}]})
    before = scenario.live(JOB, "moe-store")["metadata"]["uid"]
    scenario.reconcile()
    scenario.reconcile()
    assert scenario.live(JOB, "moe-store")["metadata"]["uid"] != before


def test_the_store_stays_ready_without_its_job_pod(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.api.remove(POD, "llm", "moe-store-x")
    scenario.restart()
    scenario.reconcile()
    assert scenario.condition_state("Ready") == ("True", "Ready")


def test_a_lost_summary_is_restored_by_running_the_job_again(scenario: ReconcilerScenario) -> None:
    scenario.reconcile()
    scenario.prepare_store()
    scenario.api.remove(POD, "llm", "moe-store-x")
    before = scenario.live(JOB, "moe-store")["metadata"]["uid"]
    scenario.reconcile()
    assert scenario.condition_state("StoreReady") == ("False", "TerminationMessageMissing")
    scenario.reconcile()
    assert scenario.live(JOB, "moe-store")["metadata"]["uid"] != before


def test_reports_a_missing_hub_token(scenario: ReconcilerScenario) -> None:
    scenario.reconcile()
    job = scenario.live(JOB, "moe-store")
    pod = make_object(
        POD,
        "moe-store-x",
        owner=job["metadata"]["uid"],
        labels=job["spec"]["template"]["metadata"]["labels"],
    )
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}
    pod["status"] = {"containerStatuses": [{"name": "c", "state": {"waiting": waiting}}]}
    del pod["metadata"]["resourceVersion"]
    scenario.api.write(pod)
    scenario.reconcile()
    assert scenario.condition_state("Ready") == ("False", "SecretNotFound")
    assert "no Secret hub" in scenario.condition("Ready")["message"]


def test_suspend_deletes_pods_and_keeps_the_store(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    sandbox = make_object(
        POD,
        "moe-sandbox-1",
        owner="uid-moe",
        labels={"faasmoe.dev/model": "moe", "app.kubernetes.io/component": "sandbox"},
    )
    del sandbox["metadata"]["resourceVersion"]
    scenario.api.write(sandbox)
    scenario.apply_model(suspend=True)
    scenario.reconcile()
    assert scenario.runtimes.removed == [(KEY, True)]
    assert scenario.live(DEPLOYMENT, "moe-router")["spec"]["replicas"] == 0
    assert (POD, "llm", "moe-sandbox-1") not in scenario.api.objects
    assert (PERSISTENT_VOLUME_CLAIM, "llm", "moe-store") in scenario.api.objects
    assert scenario.condition_state("Ready") == ("False", "Suspended")
    assert scenario.condition_state("StoreReady") == ("True", "Prepared")
    assert scenario.events().count(("Normal", "Suspended")) == 1
    scenario.apply_model()
    scenario.reconcile()
    assert KEY in scenario.runtimes.running


def test_a_deleted_model_is_left_to_the_garbage_collector(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.api.remove(MOEMODEL, "llm", "moe")
    scenario.api.writes()
    assert scenario.reconcile() == ReconcileResult(None)
    assert scenario.runtimes.removed == [(KEY, False)]
    assert scenario.api.writes() == []


def test_a_terminating_model_is_not_reconciled(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    going = scenario.live(MOEMODEL, "moe")
    going["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    scenario.api.write(going)
    scenario.api.writes()
    assert scenario.reconcile() == ReconcileResult(None)
    assert scenario.api.writes() == []
    assert not scenario.runtimes.running


def test_a_recreated_model_starts_without_the_old_state(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.api.remove(MOEMODEL, "llm", "moe")
    scenario.reconcile()
    scenario.apply_model()
    scenario.reconcile()
    assert (JOB, "llm", "moe-store") in scenario.api.objects


def test_an_invalid_spec_is_reported_and_changes_nothing(scenario: ReconcilerScenario) -> None:
    scenario.apply_model(granularity={"expertsPerFunction": -1})
    assert scenario.reconcile() == ReconcileResult(RESYNC_PERIOD_S)
    assert scenario.condition_state("Ready") == ("False", "SpecInvalid")
    assert "granularity" in scenario.condition("Ready")["message"]
    assert scenario.api.writes()[0] == ("patch_status", "MoEModel", "moe")
    assert scenario.events() == [("Warning", "SpecInvalid")]


def test_reports_why_functions_cannot_be_planned(scenario: ReconcilerScenario) -> None:
    scenario.runtimes.error = PlanError("spec.granularity.expertsPerFunction: got 100")
    scenario.reconcile()
    scenario.prepare_store()
    scenario.reconcile()
    assert scenario.condition_state("FunctionsReady") == ("False", "GranularityInvalid")
    assert scenario.condition_state("Ready")[0] == "False"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Forbidden("exceeded quota: q", status=403, reason="Forbidden"), "QuotaExceeded"),
        (Forbidden("user cannot create", status=403, reason="Forbidden"), "Forbidden"),
        (Invalid("spec: no such field", status=422, reason="Invalid"), "ObjectRejected"),
    ],
)
def test_a_rejected_object_is_reported_and_retried(
    scenario: ReconcilerScenario, error: Forbidden | Invalid, reason: str
) -> None:
    scenario.api.errors["apply", PERSISTENT_VOLUME_CLAIM] = error
    assert scenario.reconcile().has_failures
    assert scenario.condition_state("StoreReady") == ("False", reason)
    assert (JOB, "llm", "moe-store") in scenario.api.objects
    scenario.api.errors.clear()
    assert not scenario.reconcile().has_failures
    assert scenario.condition_state("StoreReady")[0] == "Unknown"


def test_a_namespace_that_is_deleted_ends_the_runtime_without_a_complaint(
    scenario: ReconcilerScenario,
) -> None:
    scenario.serve()
    ready = scenario.condition("Ready")
    scenario.api.remove(SERVICE, "llm", "moe")
    error = NamespaceTerminating("it is being terminated", status=403)
    scenario.api.errors["apply", SERVICE] = error
    assert not scenario.reconcile().has_failures
    assert scenario.runtimes.running == {}
    assert scenario.condition("Ready") == ready


def test_an_unavailable_api_server_changes_no_condition(scenario: ReconcilerScenario) -> None:
    scenario.api.errors["apply", JOB] = Unavailable("unavailable", status=503)
    with pytest.raises(Unavailable):
        scenario.reconcile()
    assert "status" not in scenario.live(MOEMODEL, "moe")


def test_recreates_a_secret_that_a_pod_misses(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    (secret,) = [name for kind, _, name in scenario.api.objects if kind == SECRET]
    scenario.api.remove(SECRET, "llm", secret)
    pod = make_object(
        POD,
        "moe-router-1",
        owner="rs",
        labels={"faasmoe.dev/model": "moe", "app.kubernetes.io/component": "router"},
    )
    waiting = {"reason": "CreateContainerConfigError", "message": f'secret "{secret}" not found'}
    pod["status"] = {"containerStatuses": [{"name": "r", "state": {"waiting": waiting}}]}
    del pod["metadata"]["resourceVersion"]
    scenario.api.write(pod)
    scenario.reconcile()
    scenario.reconcile()
    assert (SECRET, "llm", secret) in scenario.api.objects


def test_uses_an_optional_api_as_soon_as_it_is_served(scenario: ReconcilerScenario) -> None:
    scenario.apply_model(monitoring={"serviceMonitor": {}})
    scenario.serve()
    assert scenario.condition_state("RouterReady") == ("False", "CRDNotInstalled")
    assert "monitoring.coreos.com/v1" in scenario.condition("Ready")["message"]

    scenario.served_apis = frozenset({SERVICE_MONITOR.api_version})
    scenario.reconcile_until_idle()
    assert scenario.condition_state("Ready") == ("True", "Ready")
    assert scenario.live(SERVICE_MONITOR, "moe-router")["spec"]["targetLabels"] == [MODEL_LABEL]


def test_writes_counters_rarely_and_state_changes_at_once(scenario: ReconcilerScenario) -> None:
    scenario.serve()
    scenario.runtimes.reported_counts = replace(COUNTS, replicas=2)
    scenario.reconcile()
    assert scenario.status["functions"]["replicas"] == 2
    scenario.now += 1
    scenario.runtimes.reported_counts = replace(COUNTS, replicas=3)
    assert scenario.reconcile().requeue_after_s == pytest.approx(9)
    assert scenario.status["functions"]["replicas"] == 2
    scenario.runtimes.reported_counts = replace(COUNTS, active=0, replicas=0)
    scenario.reconcile()
    assert scenario.condition_state("Active") == ("False", "NoTraffic")
    assert scenario.status["functions"]["active"] == 0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (None, ("Unknown", "WaitingForRouter")),
        ({}, ("False", "KeysMissing")),
        ({"acme": 0}, ("False", "KeysMissing")),
        ({"acme": 2}, ("True", "KeysFound")),
    ],
)
def test_tenants_are_ready_when_routers_report_their_keys(
    scenario: ReconcilerScenario, keys: dict[str, int] | None, expected: tuple[str, str]
) -> None:
    scenario.runtimes.reported_counts = replace(COUNTS, tenant_keys=keys)
    scenario.apply_model(tenants=[{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}])
    scenario.serve()
    assert scenario.condition_state("TenantsReady") == expected
    assert scenario.condition_state("Ready") == ("True", "Ready")  # others are served


def test_status_has_the_urls_of_tenants(scenario: ReconcilerScenario) -> None:
    scenario.runtimes.reported_counts = replace(COUNTS, tenant_keys={"acme": 2})
    scenario.apply_model(tenants=[{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}])
    scenario.serve()
    (tenant,) = scenario.status["tenants"]
    assert (tenant["name"], tenant["keys"]) == ("acme", 2)
    assert tenant["url"].endswith("/acme/v1")


def test_services_of_many_tenants_are_written_concurrently_after_the_deployment(
    scenario: ReconcilerScenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario.apply_model()
    scenario.serve()
    in_flight, most = 0, 0
    apply = scenario.api.apply

    async def slow_apply(kind: Kind, obj: Object) -> Object:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        in_flight -= 1
        return await apply(kind, obj)

    monkeypatch.setattr(scenario.api, "apply", slow_apply)
    secret = {"apiKeysSecretRef": {"name": "keys"}}
    scenario.apply_model(
        router={"replicas": 3}, tenants=[{"name": f"t{i}", **secret} for i in range(50)]
    )
    scenario.api.requests.clear()
    scenario.reconcile()
    applied = [kind for verb, kind, _ in scenario.api.requests if verb == "apply"]
    assert applied.count("Service") == 50
    assert applied.index("Deployment") < applied.index("Service")
    assert 1 < most <= PARALLEL_REQUESTS
