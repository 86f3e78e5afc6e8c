import re
import subprocess
import sys

import pytest

from faasmoe_expert.file_pages import SMAPS, find_unchanged

MAPPINGS = """\
1000-3000 r-xp 00000000 fe:00 17 /usr/lib/libcode.so
Size:                  8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
3000-4000 r--p 00002000 fe:00 17 /usr/lib/libcode.so
Size:                  4 kB
Anonymous:             4 kB
4000-5000 rw-p 00003000 fe:00 17 /usr/lib/libcode.so
Anonymous:             0 kB
5000-6000 r--p 00000000 00:00 0
Anonymous:             0 kB
7000-8000 r--p 00000000 00:00 0                          [vvar]
Anonymous:             0 kB
ff000-fff00 r--s 00000000 fe:00 18 /data/a file with spaces
Anonymous:             0 kB
"""

PROGRAM = """
import decimal, json, re, ssl, sqlite3
from pathlib import Path
from faasmoe_expert.file_pages import release_unchanged_pages

def mapped_kilobytes():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = mapped_kilobytes()
release_unchanged_pages()
print(before, mapped_kilobytes())
assert str(decimal.Decimal(1) / 3) == "0.3333333333333333333333333333"
ssl.create_default_context()
"""


def test_only_mappings_of_files_that_cannot_have_changed_are_found() -> None:
    assert list(find_unchanged(MAPPINGS.splitlines())) == [(0x1000, 0x3000), (0xFF000, 0xFFF00)]


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_released_code_is_not_resident_and_still_runs() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = re.fullmatch(r"(\d+) (\d+)\n", run.stdout)
    assert found
    assert int(found[2]) < int(found[1]) / 2
