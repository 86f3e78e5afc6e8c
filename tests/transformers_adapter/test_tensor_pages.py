"""What is released of tensors, measured as resident memory of the process."""

import mmap
import re
from pathlib import Path

import torch

from faasmoe_transformers.tensor_pages import release_file_pages

SIZE_BYTES = 32 << 20


def resident_bytes(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_pages_of_a_mapped_tensor_are_not_resident_and_keep_their_content(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes([7]) * SIZE_BYTES)
    with path.open("rb") as file:
        mapping = mmap.mmap(
            file.fileno(), 0, mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)
    assert int(tensor.sum()) == 7 * SIZE_BYTES
    before = resident_bytes("RssFile")
    release_file_pages(tensor)
    assert before - resident_bytes("RssFile") > 0.9 * SIZE_BYTES
    assert int(tensor.sum()) == 7 * SIZE_BYTES


def test_a_tensor_that_is_not_mapped_from_a_file_keeps_its_content() -> None:
    tensor = torch.full((SIZE_BYTES,), 7, dtype=torch.uint8)
    release_file_pages(tensor)
    assert int(tensor.sum()) == 7 * SIZE_BYTES
