"""The store: a checkpoint prepared for serving and read through mmap.

Defines the directory layout, the manifest and the safetensors container. Knows nothing of torch,
of model families or of how a store is written (`faasmoe_router.checkpoint` does that).
"""

from faasmoe_contracts.store.json_fields import StoreError
from faasmoe_contracts.store.manifest import (
    STORE_FORMAT,
    STORE_VERSION,
    FileEntry,
    LayerEntry,
    Manifest,
    ModelEntry,
    manifest_digest,
)
from faasmoe_contracts.store.quantization import (
    QuantizationEntry,
    RouterEntry,
    TensorQuantization,
)
from faasmoe_contracts.store.reader import MANIFEST_NAME, Store, sha256_of_file
from faasmoe_contracts.store.tensors import DTYPE_SIZES, MappedLayer, TensorView

__all__ = [
    "DTYPE_SIZES",
    "MANIFEST_NAME",
    "STORE_FORMAT",
    "STORE_VERSION",
    "FileEntry",
    "LayerEntry",
    "Manifest",
    "MappedLayer",
    "ModelEntry",
    "QuantizationEntry",
    "RouterEntry",
    "Store",
    "StoreError",
    "TensorQuantization",
    "TensorView",
    "manifest_digest",
    "sha256_of_file",
]
