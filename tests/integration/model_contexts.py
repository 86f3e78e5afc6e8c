"""Contexts of MoEModels for tests, from an empty spec to one that sets every field."""

from typing import Any

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.kube.manifests import (
    ControlEndpoint,
    ControlSecrets,
    Images,
    ModelContext,
    sandbox_pod,
    serving_objects,
    store_objects,
)
from faasmoe_operator.kube.store_summary import LayerGroup, StoreSummary
from faasmoe_operator.kube.types import Object

GIB = 1 << 30
MIB = 1 << 20
LONG = "a-very-long-name-of-a-model-that-takes-all-of-the-63-characters"
SUMMARY = StoreSummary(
    digest="sha256:0",
    revision="a" * 40,
    source="hf://Qwen/Qwen1.5-MoE-A2.7B",
    family="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    dtype="bfloat16",
    hidden_size=2048,
    vocab_size=151_936,
    max_position_embeddings=8192,
    num_hidden_layers=24,
    size_bytes=28 * GIB,
    router_bytes=3 * GIB,
    layers=(LayerGroup(count=24, num_experts=60, top_k=4, expert_bytes=16 * MIB, shared_bytes=0),),
)
TENANTS = [
    {
        "name": "acme",
        "apiKeysSecretRef": {"name": "acme-keys"},
        "weight": 2,
        "priority": 1,
        "limits": {"requestsPerMinute": 600, "maxConcurrentRequests": 16},
        "modelAlias": "acme-chat",
        "systemPrompt": "Du heißt Acme.",
        "sharePrefixCacheWith": ["umbrella"],
    },
    {"name": "umbrella", "apiKeysSecretRef": {"name": "umbrella-keys"}},
]
TEMPLATE = {
    "labels": {"team": "llm"},
    "annotations": {"example.com/note": "hello"},
    "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "2500m", "memory": "48Gi"}},
    "nodeSelector": {"pool": "big"},
    "tolerations": [
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"operator": "Exists", "tolerationSeconds": 30, "effect": "NoExecute"},
    ],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
                ]
            }
        },
        "podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "zone"}
            ]
        },
    },
    "topologySpreadConstraints": [{"topologyKey": "zone", "maxSkew": 2}],
    "priorityClassName": "serving",
    "runtimeClassName": "nvidia",
    "image": "registry.example.com/own:1",
    "imagePullPolicy": "Always",
    "imagePullSecrets": [{"name": "registry"}],
    "env": [
        {"name": "HTTPS_PROXY", "value": "http://proxy:443"},
        {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "some", "key": "thing"}}},
        {"name": "MAPPED", "valueFrom": {"configMapKeyRef": {"name": "some", "key": "thing"}}},
    ],
}
EVERYTHING = {
    "model": {
        "source": "hf://Qwen/Qwen1.5-MoE-A2.7B",
        "revision": "main",
        "dtype": "bfloat16",
        "tokenSecretRef": {"name": "hub", "key": "token"},
    },
    "store": {
        "size": "40Gi",
        "storageClassName": "fast",
        "accessMode": "ReadWriteMany",
        "subPath": "models/mine",
    },
    "granularity": {"expertsPerFunction": 20, "layersPerFunction": 2},
    "router": {
        "replicas": 3,
        "device": "cpu",
        "maxModelLen": 4096,
        "maxNumSeqs": 16,
        "maxNumBatchedTokens": 256,
        "maxWaiting": 64,
        "kvCacheMemory": "6Gi",
        "env": [{"name": "OMP_WAIT_POLICY", "value": "ACTIVE"}],
        "template": TEMPLATE,
    },
    "experts": {"threads": 4, "functionsPerSandbox": 3, "template": TEMPLATE},
    "tenants": TENANTS,
    "networking": {
        "ingress": {
            "host": "llm.example.com",
            "className": "nginx",
            "tlsSecretName": "llm-tls",
            "annotations": {"example.com/timeout": "600"},
        },
        "clients": [
            {"namespaceSelector": {"matchLabels": {"team": "apps"}}},
            {"podSelector": {"matchLabels": {"role": "chat"}}},
        ],
    },
    "monitoring": {"serviceMonitor": {"labels": {"release": "prometheus"}}},
}
ROUTE = {"hostnames": ["llm.example.com"], "parentRefs": [{"name": "gate", "namespace": "edge"}]}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"spec": EVERYTHING},
    "cuda": {"spec": {"router": {"device": "cuda"}, "experts": {"device": "cuda"}}},
    "suspended": {"spec": {"suspend": True}},
    "unprepared": {"summary": None},
    "suspended-unprepared": {"spec": {"suspend": True}, "summary": None},
    "tenants": {"spec": {"tenants": TENANTS}},
    "ingress": {"spec": {"networking": {"ingress": {"host": "llm.example.com"}}}},
    "http-route": {"spec": {"networking": {"httpRoute": ROUTE}, "tenants": TENANTS}},
    "existing-claim": {"spec": {"store": {"claimName": "models", "accessMode": "ReadWriteMany"}}},
    "claim-as-source": {"spec": {"model": {"source": "pvc://checkpoints/qwen/chat"}}},
    "caches": {"spec": {"store": {"cache": {"sizeLimit": "4Gi", "maxBytesPerSecond": "1G"}}}},
    "caches-suspended": {"spec": {"store": {"cache": {}}, "suspend": True}},
    "s3-as-source": {"spec": {"model": {"source": "s3://models/qwen/chat"}}},
    "resized": {"can_resize": True},
    "retain": {"spec": {"store": {"reclaimPolicy": "Retain"}}},
    "long-names": {
        "name": LONG,
        "spec": {"tenants": [{"name": LONG, "apiKeysSecretRef": {"name": "k"}}]},
    },
    "begins-with-a-digit": {"name": "7b", "spec": {"tenants": TENANTS}},
}


def make_context(
    spec: dict[str, Any] | None = None, *, name: str = "qwen", **other: Any
) -> ModelContext:
    model = {"source": "hf://Qwen/Qwen1.5-MoE-A2.7B"}
    obj = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": name, "namespace": "llm", "uid": "u-1"},
        "spec": {"model": model, **(spec or {})},
    }
    values: dict[str, Any] = {
        "model": MoEModel.from_object(obj),
        "namespace": "llm",
        "uid": "u-1",
        "generation": 1,
        "images": Images("faasmoe/router:0.2.0", "faasmoe/expert:0.2.0"),
        "control": ControlEndpoint(
            "http://faasmoe-control.faasmoe.svc:8090",
            "faasmoe",
            {"app.kubernetes.io/instance": "faasmoe"},
            8090,
        ),
        "secrets": ControlSecrets("token-of-the-model", "00" * 32),
        "summary": SUMMARY,
        "served_apis": frozenset({"gateway.networking.k8s.io/v1", "monitoring.coreos.com/v1"}),
    }
    return ModelContext(**{**values, **other})


def all_objects(ctx: ModelContext) -> list[Object]:
    """Return all objects of a model, including a sandbox pod."""
    sandbox = sandbox_pod(ctx, name=f"{ctx.name[:40]}-sandbox-abcde")
    return [*store_objects(ctx), *serving_objects(ctx), sandbox]
