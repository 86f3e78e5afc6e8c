from pathlib import Path

import pytest

from faasmoe_operator.api.v1alpha1 import MoEModelError, load_moemodel
from faasmoe_operator.api.v1alpha1.moemodel import parse_moemodel
from faasmoe_operator.api.v1alpha1.yaml_documents import MAX_FILE_BYTES

BASE = """\
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {name: demo}
spec:
  model: {source: "hf://org/model"}
"""


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(MoEModelError) as caught:
        parse_moemodel(text, name="model.yaml")
    assert all(line.startswith("model.yaml: ") for line in str(caught.value).splitlines())
    return caught.value.problems


def test_only_the_source_is_required() -> None:
    spec = parse_moemodel(BASE, name="model.yaml").spec
    assert spec.model.dtype == "auto"
    assert spec.granularity.experts_per_function == "auto"
    assert (spec.router.max_num_seqs, spec.router.max_num_batched_tokens) == (32, 512)
    assert spec.router.max_model_len is None
    assert (spec.experts.functions_per_sandbox, spec.experts.threads) == (1, 1)
    scaling = spec.experts.scaling
    assert (scaling.min_scale, scaling.max_scale, scaling.target) == (0, 8, 4)
    assert (scaling.window_seconds, scaling.scale_to_zero_grace_period_seconds) == (60, 30)


def test_parses_given_values() -> None:
    text = BASE + (
        "  granularity: {expertsPerFunction: 20, layersPerFunction: 2}\n"
        "  router: {device: cpu, maxModelLen: 2048, env: [{name: HF_HOME, value: /x}]}\n"
        "  experts: {functionsPerSandbox: 3, warmPool: 0, scaling: {target: 2.5}}\n"
    )
    spec = parse_moemodel(text, name="model.yaml").spec
    assert (spec.granularity.experts_per_function, spec.granularity.layers_per_function) == (20, 2)
    assert (spec.router.device, spec.router.max_model_len) == ("cpu", 2048)
    assert [(v.name, v.value) for v in spec.router.env] == [("HF_HOME", "/x")]
    assert (spec.experts.warm_pool, spec.experts.scaling.target) == (0, 2.5)


def test_granularity_can_be_auto() -> None:
    spec = parse_moemodel(BASE + "  granularity: auto\n", name="model.yaml").spec
    assert spec.granularity.experts_per_function == "auto"


@pytest.mark.parametrize(
    ("added", "problem"),
    [
        pytest.param(
            "granularity: {expertsPerFunction: 0}",
            "spec.granularity.expertsPerFunction: got 0, expected 1 or more",
            id="no-experts-in-a-function",
        ),
        pytest.param(
            "experts: {placement: router}",
            "spec.experts.placement: got 'router', expected 'auto' or 'functions'",
            id="placement",
        ),
        pytest.param(
            "granularity: {expertsPerFunction: many}",
            "spec.granularity.expertsPerFunction: got 'many', expected an integer or 'auto'",
            id="granularity-in-words",
        ),
        pytest.param(
            "granularity: {layersPerFunction: 1.5}",
            "spec.granularity.layersPerFunction: got 1.5, expected an integer",
            id="half-a-layer",
        ),
        pytest.param(
            "granularity: fine", "spec.granularity: got 'fine', expected a mapping", id="not-auto"
        ),
        pytest.param(
            "billing: {}",
            "spec.billing: unknown field, expected one of model, store, granularity, router, "
            "experts, tenants, networking, monitoring, tracing, suspend",
            id="unknown",
        ),
        pytest.param("rooter: {}", "spec.rooter: unknown field, did you mean router?", id="typo"),
        pytest.param(
            "router: {max_num_seqs: 3}",
            "spec.router.max_num_seqs: unknown field, did you mean maxNumSeqs?",
            id="not-camel-case",
        ),
        pytest.param(
            "router: {maxNumSeqs: '8'}",
            "spec.router.maxNumSeqs: got '8', expected an integer",
            id="number-as-text",
        ),
        pytest.param(
            "router: {maxNumSeqs: true}",
            "spec.router.maxNumSeqs: got True, expected an integer",
            id="truth-as-number",
        ),
        pytest.param(
            "router: {maxNumBatchedTokens: 1000001}",
            "spec.router.maxNumBatchedTokens: got 1000001, expected at most 1000000",
            id="over-the-bound",
        ),
        pytest.param("router:", "spec.router: got nothing, expected a mapping", id="empty-part"),
        pytest.param(
            "router: {device: tpu}",
            "spec.router.device: got 'tpu', expected 'auto', 'cpu' or 'cuda'",
            id="unknown-device",
        ),
        pytest.param(
            "router: {maxNumSeqs: 64, maxNumBatchedTokens: 63}",
            "spec.router.maxNumBatchedTokens: got 63, "
            "expected at least maxNumSeqs (64), as each request decodes one token per step",
            id="batch-smaller-than-its-requests",
        ),
        pytest.param(
            "router: {1: 2}", "spec.router.1: got 1, expected a text as the key", id="number-as-key"
        ),
        pytest.param(
            "router: {env: [{name: FAASMOE_PORT}]}",
            "spec.router.env.0.name: got 'FAASMOE_PORT', "
            "expected a name without the prefix FAASMOE_",
            id="reserved-variable",
        ),
        pytest.param(
            "router: {env: [{name: A}, {name: A}]}",
            "spec.router.env.1.name: got 'A', expected each name once",
            id="variable-twice",
        ),
        pytest.param(
            "router: {template: {labels: {a b: c}}}",
            "spec.router.template.labels.a b: got 'a b', expected letters, digits, '-', '_' and "
            "'.', after a domain and '/' if there is one",
            id="key-of-a-label",
        ),
        pytest.param(
            "router: {template: {labels: {a: 5}}}",
            "spec.router.template.labels.a: got 5, expected a text",
            id="number-as-a-label",
        ),
        pytest.param(
            "router: {template: {resources: {requests: {cpu: 2}, limits: {cpu: 500m}}}}",
            "spec.router.template.resources.requests.cpu: got '2', "
            "expected at most the limit (500m)",
            id="request-above-limit",
        ),
        pytest.param(
            "router: {template: {resources: {limits: {cpu: 0.5}}}}",
            "spec.router.template.resources.limits.cpu: got 0.5, "
            "expected a quantity such as 500m, 4 or 100Gi, in quotes if it has a point",
            id="fraction-without-quotes",
        ),
        pytest.param(
            "router: {template: {affinity: {podAfinity: {}}}}",
            "spec.router.template.affinity.podAfinity: unknown field, did you mean podAffinity?",
            id="typo-in-affinity",
        ),
        pytest.param(
            "store: {size: 12}",
            "spec.store.size: got 12, expected a quantity from 1Mi to 1Pi",
            id="store-of-12-bytes",
        ),
        pytest.param(
            "tenants: [{name: a}]",
            "spec.tenants.0.apiKeysSecretRef: got nothing, "
            "expected a Secret; for `faasmoe up` a folder in apiKeysPath",
            id="tenant-without-keys",
        ),
        pytest.param(
            "tenants: [{name: a, apiKeysPath: a}, {name: a, apiKeysPath: b}]",
            "spec.tenants.1.name: got 'a', expected each name once",
            id="tenant-twice",
        ),
        pytest.param(
            "tenants: [{name: a, apiKeysPath: a, sharePrefixCacheWith: [a]}]",
            "spec.tenants.0.sharePrefixCacheWith.0: got 'a', "
            "expected the name of another tenant of this model",
            id="tenant-shares-with-itself",
        ),
        pytest.param(
            "tenants: [{name: a, apiKeysPath: a, limits: {requestPerMinute: 1}}]",
            "spec.tenants.0.limits.requestPerMinute: unknown field, "
            "did you mean requestsPerMinute?",
            id="typo-in-a-limit",
        ),
        pytest.param(
            "networking: {ingress: {host: a.b}, httpRoute: {parentRefs: [{name: a}]}}",
            "spec.networking.httpRoute: got a mapping, expected none together with ingress",
            id="two-ways-in",
        ),
        pytest.param(
            "experts: {scaling: {target: 0}}",
            "spec.experts.scaling.target: got 0, expected 0.01 or more",
            id="target-zero",
        ),
        pytest.param(
            "experts: {scaling: {target: .inf}}",
            "spec.experts.scaling.target: got inf, expected a finite number",
            id="target-without-end",
        ),
        pytest.param(
            "experts: {scaling: {windowSeconds: 5}}",
            "spec.experts.scaling.windowSeconds: got 5, expected 6 or more",
            id="window-too-short",
        ),
        pytest.param(
            "experts: {scaling: {windowSeconds: 6}}",
            "spec.experts.scaling.panicWindowPercentage: got 10, "
            "expected a panic window of 1 s or more (it is 0.6 s)",
            id="panic-window-too-short",
        ),
        pytest.param(
            "experts: {scaling: {minScale: 3, maxScale: 2}}",
            "spec.experts.scaling.minScale: got 3, expected at most maxScale (2)",
            id="min-above-max",
        ),
        pytest.param(
            "experts: {scaling: {overrides: [{layers: '0-3', minScale: 9}]}}",
            "spec.experts.scaling.overrides.0.minScale: got 9, expected at most maxScale (8)",
            id="override-contradicts",
        ),
        pytest.param(
            "experts: {scaling: {overrides: [{layers: '3-1'}]}}",
            "spec.experts.scaling.overrides.0.layers: got '3-1', "
            "expected the range 3-1 to be ascending",
            id="falling-range",
        ),
        pytest.param(
            "experts: {scaling: {overrides: [{experts: all}]}}",
            "spec.experts.scaling.overrides.0.experts: got 'all', "
            'expected indices such as "0-3,7"',
            id="range-in-words",
        ),
        pytest.param(
            "experts: {scaling: {overrides: [{minScale: 1}]}}",
            "spec.experts.scaling.overrides.0.layers: got nothing, "
            "expected layers, experts or both to be given",
            id="override-of-nothing",
        ),
    ],
)
def test_names_the_field_its_value_and_what_was_expected(added: str, problem: str) -> None:
    assert problems_of(f"{BASE}  {added}\n") == (problem,)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        pytest.param(
            "hf://org/model",
            "ftp://bucket/x",
            "spec.model.source: got 'ftp://bucket/x', "
            "expected hf://ORG/NAME, hf://ORG/NAME:QUANT, pvc://CLAIM/PATH, oci://IMAGE, "
            "s3://BUCKET/PATH, gs://BUCKET/PATH, https://HOST/PATH or file://PATH",
            id="scheme",
        ),
        pytest.param(
            '"hf://org/model"',
            '"file:///x", revision: main',
            "spec.model.revision: got 'main', expected none unless source is hf://",
            id="revision-of-a-folder",
        ),
        pytest.param(
            'source: "hf://org/model"', "dtype: auto", "spec.model.source: missing", id="no-source"
        ),
        pytest.param(
            "v1alpha1",
            "v1",
            "apiVersion: got 'faasmoe.dev/v1', expected 'faasmoe.dev/v1alpha1'",
            id="version",
        ),
        pytest.param(
            "name: demo",
            "name: De mo",
            "metadata.name: got 'De mo', expected lowercase letters, digits and '-', "
            "a letter or digit at both ends",
            id="name",
        ),
        pytest.param(
            "metadata: {name: demo}",
            "metadata: {name: demo}\nmetadata: {name: two}",
            "line 4: the key 'metadata' is given twice",
            id="key-twice",
        ),
        pytest.param("kind: MoEModel\n", "", "kind: missing", id="no-kind"),
    ],
)
def test_reports_errors_outside_the_spec(old: str, new: str, problem: str) -> None:
    assert problems_of(BASE.replace(old, new)) == (problem,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("", "document: got nothing, expected a mapping", id="empty"),
        pytest.param("[1, 2]", "document: got a list, expected a mapping", id="a-list"),
        pytest.param(f"{BASE}---\n{BASE}", "got 2 documents, expected one", id="two-documents"),
        pytest.param(
            "a: 1\n\tb: 2",
            "line 2: found character '\\t' that cannot start any token",
            id="tab",
        ),
        pytest.param("? [a]\n: 1", "line 1: found unhashable key", id="key-that-is-a-list"),
    ],
)
def test_rejects_other_documents(text: str, problem: str) -> None:
    assert problems_of(text) == (problem,)


def test_reports_all_problems_at_once() -> None:
    text = BASE + "  router: {device: tpu, maxNumSeqs: 0}\n"
    assert len(problems_of(text)) == 2


def test_reports_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(MoEModelError, match=r"none\.yaml: cannot be read: No such file"):
        load_moemodel(tmp_path / "none.yaml")


def test_rejects_a_file_that_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(MoEModelError, match="expected at most 1048576"):
        load_moemodel(file)


def test_rejects_a_binary_file(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MoEModelError, match="not UTF-8"):
        load_moemodel(file)


def test_loads_the_demo() -> None:
    demo = load_moemodel(Path(__file__).parents[3] / "examples" / "demo.yaml")
    assert demo.metadata.name == "demo"
