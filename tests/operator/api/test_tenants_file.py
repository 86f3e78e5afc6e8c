from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.tenants_file import build_tenants_file


def test_tenants_file_contains_every_tenant_and_its_limits() -> None:
    tenant = {
        "name": "acme",
        "apiKeysSecretRef": {"name": "acme-keys"},
        "weight": 2,
        "priority": -1,
        "modelAlias": "acme-chat",
        "systemPrompt": "Be brief.",
        "sharePrefixCacheWith": ["lab"],
        "limits": {"requestsPerMinute": 600, "maxQueuedRequests": 0},
    }
    model = MoEModel.from_object(
        {
            "apiVersion": "faasmoe.dev/v1alpha1",
            "kind": "MoEModel",
            "metadata": {"name": "demo"},
            "spec": {
                "model": {"source": "hf://org/name"},
                "tenants": [tenant, {"name": "lab", "apiKeysSecretRef": {"name": "lab-keys"}}],
            },
        }
    )
    assert build_tenants_file(
        model.metadata.name, model.spec.tenants, lambda tenant: f"/keys/{tenant.name}"
    ) == {
        "version": 1,
        "routerReplicas": 1,
        "model": "demo",
        "tenants": [
            {
                "name": "acme",
                "keysPath": "/keys/acme",
                "weight": 2,
                "priority": -1,
                "modelAlias": "acme-chat",
                "systemPrompt": "Be brief.",
                "sharePrefixCacheWith": ["lab"],
                "limits": {"requestsPerMinute": 600, "maxQueuedRequests": 0},
            },
            {
                "name": "lab",
                "keysPath": "/keys/lab",
                "weight": 1,
                "priority": 0,
                "modelAlias": None,
                "systemPrompt": None,
                "sharePrefixCacheWith": [],
                "limits": {},
            },
        ],
    }
