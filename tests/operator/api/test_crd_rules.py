"""Valid and invalid objects for every CEL rule of the CRD; pydantic must agree on each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError

ApiServer = Any  # conftest's; a test module cannot import it
SOURCE = "hf://org/name"
KEYS = {"apiKeysSecretRef": {"name": "keys"}}


def moemodel(spec: dict[str, Any], *, name: str = "demo") -> dict[str, Any]:
    head = {"apiVersion": "faasmoe.dev/v1alpha1", "kind": "MoEModel", "metadata": {"name": name}}
    return {**head, "spec": {"model": {"source": SOURCE}, **spec}}


def model(**fields: Any) -> dict[str, Any]:
    return {"model": {"source": SOURCE, **fields}}


def router(**fields: Any) -> dict[str, Any]:
    return {"router": fields}


def pods(**fields: Any) -> dict[str, Any]:
    return {"router": {"template": fields}}


def scaling(**fields: Any) -> dict[str, Any]:
    return {"experts": {"scaling": fields}}


def override(**fields: Any) -> dict[str, Any]:
    return scaling(overrides=[{"layers": "0", **fields}])


def tenants(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"tenants": [{**KEYS, **entry} for entry in entries]}


def networking(**fields: Any) -> dict[str, Any]:
    return {"networking": fields}


SECRET_KEY = {"name": "s", "key": "k"}
GATEWAY = {"parentRefs": [{"name": "gateway"}]}

VALID = {
    "hub": model(revision="main", tokenSecretRef=SECRET_KEY),
    "claim": model(source="pvc://models/qwen/1.5"),
    "claim-root": model(source="pvc://models"),
    "image": model(source="oci://registry.example.com:5000/models/qwen@sha256:0123"),
    "bucket": model(source="s3://models/qwen/1.5"),
    "google-bucket": model(source="gs://models"),
    "web-server": model(source="https://models.example.com:8443/qwen/"),
    "store-of-an-image": {"store": {"source": "oci://registry/stores/qwen:1", "subPath": "a"}},
    "store-caches": {
        "store": {"cache": {"sizeLimit": "4Gi", "maxBytesPerSecond": "1G", "maxConnections": 8}}
    },
    "no-resize": {"experts": {"resize": "none"}},
    "step-as-large-as-the-batch": router(maxNumSeqs=64, maxNumBatchedTokens=64),
    "env-in-both": router(env=[{"name": "A"}], template={"env": [{"name": "B", "value": ""}]}),
    "env-of-a-secret": pods(env=[{"name": "A", "valueFrom": {"secretKeyRef": SECRET_KEY}}]),
    "env-of-a-config-map": pods(env=[{"name": "A", "valueFrom": {"configMapKeyRef": SECRET_KEY}}]),
    "labels": pods(labels={"team.example.com/name": "a"}, annotations={"note": "b"}),
    "request-below-limit": pods(
        resources={"requests": {"cpu": "500m", "memory": 1}, "limits": {"cpu": 1, "x/gpu": 2}}
    ),
    "tolerates-all": pods(tolerations=[{"operator": "Exists"}]),
    "tolerates-one": pods(tolerations=[{"key": "a", "value": "b", "effect": "NoSchedule"}]),
    "cache": router(kvCacheMemory="1.5Gi"),
    "engine": router(engine="vllm", engineArgs={"enforceEager": True, "maxLogprobs": 5}),
    "served-name": router(servedModelName="org/qwen", corsOrigins=["https://a.example:8080", "*"]),
    "least-and-most": {"router": {"kvCacheMemory": "1Mi"}, "store": {"size": "1Pi"}},
    "fixed-scale": scaling(minScale=8, initialScale=8, activationScale=8),
    "panic-window-of-1-s": scaling(windowSeconds=10, panicWindowPercentage=10),
    "override-raises-both": override(minScale=9, maxScale=9, experts="0-3,7,5-5"),
    "override-of-windows": override(windowSeconds=6, panicWindowPercentage=20),
    "store-resources": {"store": {"resources": {"requests": {"cpu": 1}, "limits": {"cpu": "2"}}}},
    "claim-of-the-user": {"store": {"claimName": "shared", "subPath": "models/qwen"}},
    "tenants": tenants({"name": "a", "sharePrefixCacheWith": ["b"]}, {"name": "b"}),
    "ingress": networking(ingress={"host": "llm.example.com"}),
    "route": networking(httpRoute=GATEWAY, clients=[{"podSelector": {}}]),
    "certificates": model(caBundleRef=SECRET_KEY),
    "volumes": pods(
        volumes=[{"name": "a", "configMap": {"name": "c"}}, {"name": "b", "emptyDir": {}}],
        volumeMounts=[{"name": "a", "mountPath": "/etc/ssl/mine"}],
    ),
    "experts-in-a-function": {"granularity": {"expertsPerFunction": 20}},
    "experts-in-a-function-auto": {"granularity": {"expertsPerFunction": "auto"}},
}

INVALID = {
    "file": (model(source="file:///x"), "file:// is for `faasmoe up` only"),
    "way-up": (model(source="pvc://models/../x"), "expected hf://ORG/NAME, pvc://CLAIM/PATH"),
    "way-up-in-a-bucket": (model(source="s3://models/../x"), "expected hf://ORG/NAME"),
    "image-and-claim": (
        {"store": {"source": "oci://a/b", "claimName": "c"}},
        "no claimName together with source",
    ),
    "image-and-class": (
        {"store": {"source": "oci://a/b", "storageClassName": "c"}},
        "no storageClassName together with source",
    ),
    "image-and-cache": (
        {"store": {"source": "oci://a/b", "cache": {}}},
        "no cache together with source",
    ),
    "revision": (model(source="pvc://m/x", revision="a"), "no revision unless source is hf://"),
    "token": (
        model(source="pvc://m/x", tokenSecretRef=SECRET_KEY),
        "no tokenSecretRef unless source is hf://",
    ),
    "certificates": (
        model(source="pvc://m/x", caBundleRef=SECRET_KEY),
        "no caBundleRef unless source is hf://",
    ),
    "volume-without-source": (pods(volumes=[{"name": "a"}]), "exactly one of configMap, secret"),
    "volume-of-two-sources": (
        pods(volumes=[{"name": "a", "emptyDir": {}, "secret": {"secretName": "s"}}]),
        "exactly one of configMap, secret",
    ),
    "mount-of-no-volume": (
        pods(volumeMounts=[{"name": "a", "mountPath": "/data"}]),
        "each name to be that of one of volumes",
    ),
    "mount-over-the-store": (
        pods(
            volumes=[{"name": "a", "emptyDir": {}}],
            volumeMounts=[{"name": "a", "mountPath": "/store/x"}],
        ),
        "a path outside /store",
    ),
    "router-scale": (
        router(scaling={"minReplicas": 3, "maxReplicas": 2}),
        "at least minReplicas",
    ),
    "replicas-and-scaling": (router(replicas=2, scaling={}), "none with scaling"),
    "step": (router(maxNumSeqs=64, maxNumBatchedTokens=63), "at least maxNumSeqs"),
    "env-twice": (
        router(env=[{"name": "A"}], template={"env": [{"name": "A"}]}),
        "each name once in env and template.env",
    ),
    "env-reserved": (router(env=[{"name": "FAASMOE_PORT"}]), "without the prefix FAASMOE_"),
    "pod-env-reserved": (pods(env=[{"name": "FAASMOE_X"}]), "without the prefix FAASMOE_"),
    "two-values": (
        pods(env=[{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": SECRET_KEY}}]),
        "value or valueFrom, not both",
    ),
    "no-source": (pods(env=[{"name": "A", "valueFrom": {}}]), "exactly one of secretKeyRef"),
    "two-sources": (
        pods(
            env=[
                {
                    "name": "A",
                    "valueFrom": {"secretKeyRef": SECRET_KEY, "configMapKeyRef": SECRET_KEY},
                }
            ]
        ),
        "exactly one of secretKeyRef",
    ),
    "label-reserved": (pods(labels={"faasmoe.dev/model": "x"}), "keys without the prefixes"),
    "annotation-reserved": (
        pods(annotations={"app.kubernetes.io/x": ""}),
        "keys without the prefixes",
    ),
    "request-above-limit": (
        pods(resources={"requests": {"cpu": 2}, "limits": {"cpu": "1999m"}}),
        "no request above the limit",
    ),
    "toleration-with-value": (
        pods(tolerations=[{"operator": "Exists", "value": "x"}]),
        "no value with the operator Exists",
    ),
    "toleration-without-key": (pods(tolerations=[{"value": "x"}]), "expected a key"),
    "args-of-another-engine": (
        router(engine="transformers", engineArgs={"maxLogprobs": 5}),
        "none with engine transformers",
    ),
    "compute-of-another-engine": (router(engine="vllm", compute="torch"), "auto with engine vllm"),
    "two-sizes-of-a-cache": (
        router(engineArgs={"gpuMemoryUtilization": 0.5}, kvCacheMemory="1Gi"),
        "only one of engineArgs.gpuMemoryUtilization and kvCacheMemory",
    ),
    "cache-too-small": (router(kvCacheMemory="1023Ki"), "a quantity from 1Mi to 1Pi"),
    "disk-too-large": ({"store": {"size": "1025Ti"}}, "a quantity from 1Mi to 1Pi"),
    "min": (scaling(minScale=9), "at most maxScale"),
    "initial": (scaling(initialScale=9), "at most maxScale"),
    "activation": (scaling(activationScale=9), "at most maxScale"),
    "override-min": (override(minScale=9), "minScale of each override"),
    "override-max": (scaling(minScale=4, overrides=[{"layers": "0", "maxScale": 3}]), "of each"),
    "override-initial": (override(initialScale=9), "initialScale of each override"),
    "override-activation": (override(activationScale=9), "activationScale of each override"),
    "panic": (scaling(windowSeconds=9), "a panic window of 1 s or more"),
    "override-panic": (override(windowSeconds=9), "in each override too"),
    "override-of-nothing": (scaling(overrides=[{"minScale": 1}]), "layers, experts or both"),
    "falling-layers": (override(layers="0,3-1"), "ascending ranges"),
    "falling-experts": (override(experts="10-9"), "ascending ranges"),
    "class-of-a-claim": (
        {"store": {"claimName": "a", "storageClassName": "b"}},
        "no storageClassName together with claimName",
    ),
    "path-up": ({"store": {"subPath": "a/../b"}}, "a path without .."),
    "no-keys": ({"tenants": [{"name": "a"}]}, "a Secret whose every value is an API key"),
    "shares-with-nobody": (
        tenants({"name": "a", "sharePrefixCacheWith": ["b"]}),
        "only names of other tenants",
    ),
    "shares-with-itself": (
        tenants({"name": "a", "sharePrefixCacheWith": ["a"]}),
        "only names of other tenants",
    ),
    "two-ways-in": (
        networking(ingress={"host": "a.b"}, httpRoute=GATEWAY),
        "ingress or httpRoute, not both",
    ),
    "client-of-nothing": (networking(clients=[{}]), "namespaceSelector, podSelector or both"),
}

INVALID_BY_SCHEMA = {
    "tenant-twice": tenants({"name": "a"}, {"name": "a"}),
    "variable-twice": router(env=[{"name": "A"}, {"name": "A"}]),
    "pull-secret-twice": pods(imagePullSecrets=[{"name": "a"}, {"name": "a"}]),
    "spread-twice": pods(topologySpreadConstraints=[{"topologyKey": "a"}, {"topologyKey": "a"}]),
    "host-twice": networking(httpRoute={**GATEWAY, "hostnames": ["a.b", "a.b"]}),
    "shared-twice": tenants({"name": "a", "sharePrefixCacheWith": ["b", "b"]}, {"name": "b"}),
    "no-gateway": networking(httpRoute={"parentRefs": []}),
    "folder-of-keys": {"tenants": [{"name": "a", "apiKeysPath": "keys"}]},
    "store-folder": {"store": {"path": "x"}},
    "store-of-a-bucket": {"store": {"source": "s3://stores/qwen"}},
    "no-connections": {"store": {"cache": {"maxConnections": 0}}},
    "source-of-no-scheme": model(source="ftp://models/qwen"),
    "tenants-name": tenants({"name": "Acme"}),
    "negative-quantity": {"store": {"size": -5}},
    "negative-quantity-as-text": {"store": {"size": "-5Gi"}},
    "fraction-as-number": pods(resources={"limits": {"cpu": 0.5}}),
    "word-as-granularity": {"granularity": {"expertsPerFunction": "many"}},
    "no-experts-in-a-function": {"granularity": {"expertsPerFunction": 0}},
    "rate-of-one": scaling(maxScaleUpRate=1),
    "no-router": router(replicas=0),
    "mxfp4-router": router(quantization="mxfp4"),
    "unknown-quantization": {"experts": {"quantization": "int3"}},
    "read-only": {"store": {"accessMode": "ReadOnlyMany"}},
    "affinity": pods(affinity={"podAfinity": {}}),
    "unknown": {"tracing": {}},
}

OLD: dict[str, Any] = {
    "model": {"source": SOURCE, "revision": "main"},
    "store": {"size": "100Gi", "storageClassName": "fast", "subPath": "demo"},
}
OLD_CLAIM: dict[str, Any] = {"model": {"source": SOURCE}, "store": {"claimName": "shared"}}

IMMUTABLE: dict[str, Any] = {
    "source": (OLD, {"model": {"source": "hf://org/other", "revision": "main"}}, "another source"),
    "revision": (OLD, {"model": {"source": SOURCE, "revision": "v2"}}, "another revision"),
    "revision-dropped": (OLD, {"model": {"source": SOURCE}}, "another revision"),
    "dtype": (OLD, {"model": {**OLD["model"], "dtype": "float32"}}, "another dtype"),
    "experts-quantization": (
        {**OLD, "experts": {"quantization": "none"}},
        {"experts": {"quantization": "int8"}},
        "another quantization",
    ),
    "router-quantization": (
        {**OLD, "router": {"quantization": "int4"}},
        {"router": {"quantization": "int8"}},
        "another quantization",
    ),
    "storage-class": (OLD, {"store": {**OLD["store"], "storageClassName": "slow"}}, "cannot move"),
    "sub-path": (OLD, {"store": {**OLD["store"], "subPath": "other"}}, "cannot move"),
    "access-mode": (OLD, {"store": {**OLD["store"], "accessMode": "ReadWriteMany"}}, "cannot move"),
    "claim": (OLD_CLAIM, {"store": {"claimName": "other"}}, "cannot move"),
    "claim-dropped": (OLD_CLAIM, {"store": {}}, "cannot move"),
    "smaller": (OLD, {"store": {**OLD["store"], "size": "99Gi"}}, "a volume cannot shrink"),
}


def as_params(cases: dict[str, Any]) -> Any:
    return [pytest.param(case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize("spec", as_params(VALID))
def test_crd_and_pydantic_accept_valid_specs(api_server: ApiServer, spec: dict[str, Any]) -> None:
    assert api_server.problems(moemodel(spec)) == []
    MoEModel.from_object(moemodel(spec))


@pytest.mark.parametrize("case", as_params(INVALID))
def test_crd_rules_and_pydantic_reject_invalid_specs(
    api_server: ApiServer, case: tuple[dict[str, Any], str]
) -> None:
    spec, message = case
    (problem,) = api_server.problems(moemodel(spec))
    assert message in problem
    with pytest.raises(MoEModelError):
        MoEModel.from_object(moemodel(spec))


@pytest.mark.parametrize("spec", as_params(INVALID_BY_SCHEMA))
def test_crd_schema_and_pydantic_reject_invalid_specs(
    api_server: ApiServer, spec: dict[str, Any]
) -> None:
    assert api_server.problems(moemodel(spec))
    with pytest.raises(MoEModelError):
        MoEModel.from_object(moemodel(spec))


@pytest.mark.parametrize("case", as_params(IMMUTABLE))
def test_immutable_fields_are_rejected_on_update_only(
    api_server: ApiServer, case: tuple[dict[str, Any], dict[str, Any], str]
) -> None:
    old, change, message = case
    new = moemodel({**old, **change})
    assert api_server.problems(new) == []
    (problem,) = api_server.problems(new, moemodel(old))
    assert message in problem


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"store": {**OLD["store"], "size": "0.2Ti"}}, id="larger-store"),
        pytest.param({"store": {**OLD["store"], "reclaimPolicy": "Retain"}}, id="reclaim-policy"),
        pytest.param(
            {"store": {**OLD["store"], "resources": {"limits": {"memory": "32Gi"}}}},
            id="store-resources",
        ),
        pytest.param({"granularity": {"expertsPerFunction": 4}}, id="granularity"),
        pytest.param({"suspend": True, **router(replicas=3)}, id="suspend"),
        pytest.param(
            {"model": {**OLD["model"], "tokenSecretRef": {"name": "s", "key": "k"}}}, id="token"
        ),
    ],
)
def test_other_fields_are_mutable(api_server: ApiServer, change: dict[str, Any]) -> None:
    assert api_server.problems(moemodel({**OLD, **change}), moemodel(OLD)) == []


@pytest.mark.parametrize("name", ["2nd", "a.b", "a" * 64])
def test_rejects_names_that_are_invalid_for_services(api_server: ApiServer, name: str) -> None:
    assert api_server.problems(moemodel({}, name=name))
    assert api_server.problems(moemodel({}, name="a" * 63)) == []


def test_every_rule_is_covered_by_a_case(api_server: ApiServer) -> None:
    broken = {problem.partition(": ")[2] for problem in _all_problems(api_server)}
    assert {rule["message"] for _, rule in api_server.rules()} == broken


def _all_problems(api_server: ApiServer) -> Iterator[str]:
    for spec, _ in INVALID.values():
        yield from api_server.problems(moemodel(spec))
    for old, change, _ in IMMUTABLE.values():
        yield from api_server.problems(moemodel({**old, **change}), moemodel(old))
    yield from api_server.problems(moemodel({}, name="2nd"))


scales = st.integers(0, 12)
scaling_st = st.fixed_dictionaries(
    {},
    optional={
        "minScale": scales,
        "maxScale": scales,
        "initialScale": scales,
        "activationScale": scales,
        "windowSeconds": st.sampled_from([5, 6, 10.5, 60]),
        "panicWindowPercentage": st.sampled_from([1, 9.5, 10, 100]),
    },
)
ranges = st.sampled_from(["0", "0-3", "3-0", "0-3,7", "7-7", "x", "9-10"])
overrides_st = st.lists(
    st.tuples(
        scaling_st, st.fixed_dictionaries({}, optional={"layers": ranges, "experts": ranges})
    ).map(lambda both: {**both[0], **both[1]}),
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(scaling_st, overrides_st)
def test_api_server_and_pydantic_agree_on_scaling(
    api_server: ApiServer, general: dict[str, Any], overrides: list[dict[str, Any]]
) -> None:
    obj = moemodel(scaling(**general, overrides=overrides))
    try:
        MoEModel.from_object(obj)
        is_valid = True
    except MoEModelError:
        is_valid = False
    assert (api_server.problems(obj) == []) == is_valid
