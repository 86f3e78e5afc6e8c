import os
from pathlib import Path

from faasmoe_operator.platforms.memory import MemoryParts, memory_parts, pss_bytes


def test_reads_the_proportional_set_size(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps_rollup").write_text(
        "0-1 ---p 0 00:00 0 [rollup]\nRss:  90 kB\nPss:     12 kB\nPss_Dirty: 3 kB\n"
    )
    assert pss_bytes(7, proc=tmp_path) == 12 * 1024


def test_returns_none_for_an_exited_process(tmp_path: Path) -> None:
    assert pss_bytes(7, proc=tmp_path) is None


def test_reads_the_size_of_the_current_process() -> None:
    size_bytes = pss_bytes(os.getpid())
    assert size_bytes is not None
    assert size_bytes > 1 << 20


def test_divides_pages_of_files_from_others(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    rollup = tmp_path / "7" / "smaps_rollup"
    rollup.write_text("Pss:     12 kB\nPss_Anon:   4 kB\nPss_File:  5 kB\nPss_Shmem:  3 kB\n")
    assert memory_parts(7, proc=tmp_path) == MemoryParts(7 * 1024, 5 * 1024)
    rollup.write_text("Pss:     12 kB\n")
    assert memory_parts(7, proc=tmp_path) == MemoryParts(12 * 1024, 0)
    assert memory_parts(8, proc=tmp_path) is None
