"""Additional volumes, the hub's certificates, and the user of pods."""

from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.errors import MoEModelError
from faasmoe_operator.kube.manifests import ModelContext, sandbox_pod, serving_objects
from faasmoe_operator.kube.manifests.store import store_job
from faasmoe_operator.kube.types import Object

TEMPLATE = {
    "volumes": [{"name": "store", "configMap": {"name": "certificates"}}],
    "volumeMounts": [{"name": "store", "mountPath": "/etc/ssl/mine", "subPath": "ca.pem"}],
}


def router_pod(ctx: ModelContext) -> Any:
    [deployment] = [obj for obj in serving_objects(ctx) if obj["kind"] == "Deployment"]
    return deployment["spec"]["template"]


def pods(ctx: ModelContext) -> dict[str, Object]:
    return {
        "router": router_pod(ctx)["spec"],
        "sandbox": sandbox_pod(ctx, name="s")["spec"],
        "store": store_job(ctx)["spec"]["template"]["spec"],
    }


def test_volumes_of_templates_are_mounted_beside_those_of_the_operator() -> None:
    ctx = make_context({"router": {"template": TEMPLATE}, "experts": {"template": TEMPLATE}})
    for pod in pods(ctx).values():
        names = [volume["name"] for volume in pod["volumes"]]
        assert len(set(names)) == len(names)
        own = {volume["name"]: volume for volume in pod["volumes"]}["template-store"]
        assert own["configMap"] == {"name": "certificates"}
        [mount] = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == own["name"]]
        assert mount == {
            "name": "template-store",
            "mountPath": "/etc/ssl/mine",
            "subPath": "ca.pem",
            "readOnly": True,
        }


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"volumes": [{"name": "a"}]}, "exactly one of configMap"),
        (
            {"volumes": [{"name": "a", "emptyDir": {}, "secret": {"secretName": "s"}}]},
            "exactly one of configMap",
        ),
        ({"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"volumeMounts": [{"name": "a", "mountPath": "/data"}]}, "one of volumes"),
        (
            {
                "volumes": [{"name": "a", "emptyDir": {}}],
                "volumeMounts": [{"name": "a", "mountPath": "/store/x"}],
            },
            "a path outside /store",
        ),
    ],
)
def test_other_volumes_and_paths_are_refused(template: Object, message: str) -> None:
    with pytest.raises(MoEModelError, match=message):
        make_context({"router": {"template": template}})


def test_the_store_job_alone_gets_the_certificates_of_the_hub() -> None:
    reference = {"name": "mirror", "key": "bundle.pem"}
    ctx = make_context({"model": {"source": "hf://org/name", "caBundleRef": reference}})
    found = pods(ctx)
    [container] = found["store"]["containers"]
    environment = {v["name"]: v.get("value") for v in container["env"]}
    assert environment["SSL_CERT_FILE"] == "/etc/faasmoe/ca/ca.crt"
    assert environment["REQUESTS_CA_BUNDLE"] == environment["SSL_CERT_FILE"]
    [volume] = [v for v in found["store"]["volumes"] if v["name"] == "ca-bundle"]
    assert volume["configMap"] == {
        "name": "mirror",
        "items": [{"key": "bundle.pem", "path": "ca.crt"}],
    }
    for name in ("router", "sandbox"):
        assert "ca-bundle" not in [v["name"] for v in found[name]["volumes"]]


def test_certificates_are_for_hubs_only() -> None:
    model = {"source": "pvc://claim/x", "caBundleRef": {"name": "mirror", "key": "a"}}
    with pytest.raises(MoEModelError, match="caBundleRef"):
        make_context({"model": model})


@pytest.mark.parametrize("user_id", [65532, 1000680000, None])
def test_pods_run_as_the_configured_user_or_the_platforms(user_id: int | None) -> None:
    for pod in pods(make_context({}, user_id=user_id)).values():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        ids = {context.get(name) for name in ("runAsUser", "runAsGroup", "fsGroup")}
        assert ids == {user_id}
