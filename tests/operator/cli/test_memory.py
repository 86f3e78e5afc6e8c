import os
from pathlib import Path

import pytest

from faasmoe_operator.cli.memory import format_bytes, pss_bytes


def test_reads_the_proportional_set_size(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps_rollup").write_text(
        "0-1 ---p 0 00:00 0 [rollup]\nRss:  90 kB\nPss:     12 kB\nPss_Dirty: 3 kB\n"
    )
    assert pss_bytes(7, proc=tmp_path) == 12 * 1024


def test_knows_no_size_of_a_process_that_is_gone(tmp_path: Path) -> None:
    assert pss_bytes(7, proc=tmp_path) is None


def test_reads_its_own_size() -> None:
    size_bytes = pss_bytes(os.getpid())
    assert size_bytes is not None
    assert size_bytes > 1 << 20


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(None, "-"), (0, "0 B"), (1536, "1.5 KiB"), (43 << 20, "43.0 MiB"), (3 << 29, "1.50 GiB")],
)
def test_formats_sizes(size_bytes: int | None, text: str) -> None:
    assert format_bytes(size_bytes) == text
