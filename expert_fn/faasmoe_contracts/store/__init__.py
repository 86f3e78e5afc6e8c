"""The store: a checkpoint prepared for serving, read here by mmap.

Knows the folder's layout, its manifest and the safetensors container; knows nothing of torch, of
model families or of how a store is made (`faasmoe_router.checkpoint` makes it).
"""

from faasmoe_contracts.store.manifest import (
    STORE_FORMAT,
    STORE_VERSION,
    FileEntry,
    LayerEntry,
    Manifest,
    ModelEntry,
    StoreError,
    manifest_digest,
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
    "Store",
    "StoreError",
    "TensorView",
    "manifest_digest",
    "sha256_of_file",
]
