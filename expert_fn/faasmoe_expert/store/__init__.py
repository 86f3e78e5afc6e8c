"""The store: a checkpoint prepared for serving, read here by mmap.

Knows the folder's layout, its manifest and the safetensors container; knows nothing of torch, of
model families or of how a store is made (`faasmoe_router.checkpoint` makes it).
"""

from faasmoe_expert.store.errors import StoreError
from faasmoe_expert.store.manifest import (
    FORMAT,
    VERSION,
    FileEntry,
    LayerEntry,
    Manifest,
    ModelEntry,
    manifest_digest,
)
from faasmoe_expert.store.reader import MANIFEST_NAME, Store, sha256_of_file
from faasmoe_expert.store.tensors import DTYPE_SIZES, LayerMap, TensorView

__all__ = [
    "DTYPE_SIZES",
    "FORMAT",
    "MANIFEST_NAME",
    "VERSION",
    "FileEntry",
    "LayerEntry",
    "LayerMap",
    "Manifest",
    "ModelEntry",
    "Store",
    "StoreError",
    "TensorView",
    "manifest_digest",
    "sha256_of_file",
]
