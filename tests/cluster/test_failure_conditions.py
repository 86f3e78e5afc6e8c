"""Failures that no schema can catch lead to a condition that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from apiserver import ApiRequestError, ApiServer, Object, eventually
from fake_node import FakeNode
from moemodels import conditions, make_moemodel, make_secret, wait_for_condition
from operator_process import NAMESPACE, OperatorProcess


def test_reports_a_missing_source_and_retries(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    claim: str,
    tiny_model: Callable[..., Object],
) -> None:
    model = tiny_model("tiny")
    model["spec"]["model"]["source"] = f"pvc://{claim}/elsewhere"
    api.create("moemodels", model)
    found = wait_for_condition(
        api, namespace, "tiny", "StoreReady", status="False", reason="SourceNotFound"
    )
    assert f"pvc://{claim}/elsewhere" in found["message"]
    assert "/source/" not in found["message"]
    assert conditions(api, namespace, "tiny")["Ready"]["status"] == "False"
    eventually(lambda: _events(api, namespace), lambda found: "SourceNotFound" in found)

    folder = node.claim_folder(namespace, claim)
    (folder / "tiny").rename(folder / "elsewhere")
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=240)


def test_reports_a_missing_secret(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    source = "hf://faasmoe-tests/there-is-no-such-model"
    token = {"name": "hub-token", "key": "token"}
    api.create("moemodels", tiny_model("tiny", model={"source": source, "tokenSecretRef": token}))
    found = wait_for_condition(
        api, namespace, "tiny", "StoreReady", status="False", reason="SecretNotFound"
    )
    assert "hub-token" in found["message"]

    api.create("secrets", make_secret("hub-token", namespace, {"token": "hf_x"}))
    eventually(
        lambda: conditions(api, namespace, "tiny")["StoreReady"],
        lambda store: store["reason"] in ("HubUnavailable", "HubUnauthorized", "SourceNotFound"),
        timeout_s=180,
    )


def test_reports_a_request_that_fits_no_node(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    model = tiny_model("tiny", experts={"warmPool": 1})
    resources = {"requests": {"memory": "100Pi"}, "limits": {"memory": "100Pi"}}
    model["spec"]["experts"]["template"]["resources"] = resources
    api.create("moemodels", model)
    found = wait_for_condition(
        api, namespace, "tiny", "FunctionsReady", status="False", reason="Unschedulable"
    )
    assert "memory" in found["message"]
    assert conditions(api, namespace, "tiny")["Ready"]["status"] == "False"


def test_rejects_a_store_of_another_model(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    claim: str,
    tiny_model: Callable[..., Object],
) -> None:
    folder = node.claim_folder(namespace, claim)
    (folder / "other").symlink_to("tiny")
    shared = {"claimName": claim, "subPath": "prepared"}
    api.create("moemodels", tiny_model("one", store=shared))
    wait_for_condition(api, namespace, "one", "StoreReady")
    other = tiny_model("two", store=shared)
    other["spec"]["model"] = {"source": f"pvc://{claim}/other", "dtype": "bfloat16"}
    api.create("moemodels", other)
    wait_for_condition(api, namespace, "two", "StoreReady", status="False", reason="StoreMismatch")
    wait_for_condition(api, namespace, "one", "Ready")


def test_reports_an_invalid_granularity_until_it_is_corrected(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny", granularity={"expertsPerFunction": 99}))
    found = wait_for_condition(api, namespace, "tiny", "FunctionsReady", status="False")
    assert "expertsPerFunction" in found["message"]
    change = {"granularity": {"expertsPerFunction": 4}}
    api.patch("moemodels", namespace, "tiny", {"spec": change})
    wait_for_condition(api, namespace, "tiny", "Ready")


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        pytest.param({"model": {"source": "file:///x"}}, "spec.model.source", id="source"),
        pytest.param({"model": {"source": "hf://a/b"}, "suspend": 3}, "spec.suspend", id="type"),
        pytest.param(
            {"model": {"source": "hf://a/b"}, "experts": {"scaling": {"minScale": 9}}},
            "spec.experts.scaling.minScale",
            id="across-fields",
        ),
    ],
)
def test_the_api_server_rejects_invalid_specs(
    api: ApiServer, service_account: str, namespace: str, spec: dict[str, Any], field: str
) -> None:
    with pytest.raises(ApiRequestError, match=field.replace(".", r"\.")) as rejected:
        api.create("moemodels", make_moemodel("tiny", namespace, **spec))
    assert rejected.value.status == 422


def test_operator_has_only_the_permissions_of_the_chart(
    api: ApiServer, operator: OperatorProcess, namespace: str
) -> None:
    token = api.create_token(NAMESPACE, operator.service_account)
    bearer = ApiServer(api.credentials.with_token(token))
    for plural in ("secrets", "namespaces", "nodes", "customresourcedefinitions"):
        with pytest.raises(ApiRequestError) as rejected:
            bearer.list(plural, namespace)
        assert rejected.value.status == 403
    bearer.close()
    assert "forbidden: User" not in operator.log()


def _events(api: ApiServer, namespace: str) -> list[str]:
    return [event["reason"] for event in api.list("events", namespace)]
