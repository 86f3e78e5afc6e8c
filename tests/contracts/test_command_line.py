"""The command line that `ps` shows, of real processes."""

import subprocess
import sys

SCRIPT = (
    "import sys; from pathlib import Path\n"
    "from faasmoe_contracts.command_line import show_command\n"
    "show_command(sys.argv[1:])\n"
    "print(Path('/proc/self/cmdline').read_bytes().rstrip(b'\\0').decode().split('\\0'))\n"
)


def shown(*words: str) -> str:
    command = (sys.executable, "-c", SCRIPT, *words)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_another_command_is_shown() -> None:
    assert shown("python", "-m", "some.module") == "['python', '-m', 'some.module']"


def test_a_command_that_does_not_fit_is_cut_off() -> None:
    script = SCRIPT.replace("sys.argv[1:]", "['x' * 10_000]").replace("print(", "print(len(")
    script = script.replace(".decode().split('\\0'))", "))")
    command = (sys.executable, "-c", script)
    length = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert length == sum(len(word) + 1 for word in command) - 1
