"""Regular expressions of a MoEModel's strings, and their descriptions in error messages.

They use only ASCII and the common syntax of Rust's `regex`, RE2 and Python's `re`, as pydantic, the
Kubernetes API server and the tests use different engines.
"""

from __future__ import annotations

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_QUALIFIED_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"

DNS_LABEL = rf"^{_DNS_LABEL}$"
DNS_1035_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
DNS_SUBDOMAIN = rf"^{_DNS_LABEL}(\.{_DNS_LABEL})*$"
QUALIFIED_NAME = rf"^({_DNS_LABEL}(\.{_DNS_LABEL})*/)?{_QUALIFIED_PART}$"
LABEL_VALUE = rf"^({_QUALIFIED_PART})?$"
ENV_VAR_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
SECRET_KEY = r"^[-._A-Za-z0-9]+$"
IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$"
RELATIVE_PATH = r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$"
ABSOLUTE_PATH = r"^(/[A-Za-z0-9._-]+)+$"
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
CORS_ORIGIN = r"^(\*|https?://[A-Za-z0-9.:_-]+)$"
HTTP_URL = r"^https?://[A-Za-z0-9.:_-]+(/[A-Za-z0-9._/-]*)?$"
INDEX_RANGES = r"^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$"
QUANTITY = (
    r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$"  # never negative
)

_HUB_FILE = r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*"  # a GGUF file or quantisation
HUB_ID = rf"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(:{_HUB_FILE})?"
_HUB_SOURCE = rf"hf://{HUB_ID}"
_PVC_SOURCE = rf"pvc://{_DNS_LABEL}(\.{_DNS_LABEL})*(/[A-Za-z0-9._-]+)*/?"
_OCI_REFERENCE = r"[A-Za-z0-9][A-Za-z0-9._:/@-]*"
_OBJECT_SOURCE = r"(s3|gs|https)://[A-Za-z0-9][A-Za-z0-9.:_-]*(/[A-Za-z0-9._-]+)*/?"
OCI_SOURCE = rf"^oci://{_OCI_REFERENCE}$"
KUBERNETES_SOURCE = rf"^({_HUB_SOURCE}|{_PVC_SOURCE}|oci://{_OCI_REFERENCE}|{_OBJECT_SOURCE})$"
SOURCE = rf"^({_HUB_SOURCE}|{_PVC_SOURCE}|oci://{_OCI_REFERENCE}|{_OBJECT_SOURCE}|file://.+)$"

DESCRIPTIONS = {
    DNS_LABEL: "lowercase letters, digits and '-', a letter or digit at both ends",
    DNS_SUBDOMAIN: (
        "lowercase letters, digits, '-' and '.', a letter or digit at both ends of each part"
    ),
    QUALIFIED_NAME: "letters, digits, '-', '_' and '.', after a domain and '/' if there is one",
    LABEL_VALUE: "letters, digits, '-', '_' and '.', a letter or digit at both ends",
    ENV_VAR_NAME: "letters, digits and '_', no digit first",
    SECRET_KEY: "letters, digits, '-', '_' and '.'",
    IMAGE: "a container image such as registry.example.com/faasmoe:0.2.0",
    RELATIVE_PATH: "a path such as models/mine: letters, digits, '-', '_', '.', no '/' at its ends",
    ABSOLUTE_PATH: "an absolute path such as /etc/ssl/mine: letters, digits, '-', '_', '.'",
    MODEL_NAME: "letters, digits, '.', '_', ':', '/' and '-', a letter or digit first",
    CORS_ORIGIN: "an origin such as https://chat.example.com, or *",
    HTTP_URL: "a URL such as http://127.0.0.1:4318",
    INDEX_RANGES: 'indices such as "0-3,7"',
    QUANTITY: "a quantity such as 500m, 4 or 100Gi",
    SOURCE: (
        "hf://ORG/NAME, hf://ORG/NAME:QUANT, pvc://CLAIM/PATH, oci://IMAGE, s3://BUCKET/PATH, "
        "gs://BUCKET/PATH, https://HOST/PATH or file://PATH"
    ),
    OCI_SOURCE: "an OCI artifact such as oci://registry.example.com/stores/qwen:1",
}
