"""Records which modules of FaaSMoE run, from SIGUSR1 to SIGUSR2, and writes their names to a file.

Python imports this module at start when its folder is on PYTHONPATH (`benchmarks.trace_chat` puts
it there). Profiling is installed in every thread from the start, since Python 3.11 cannot install
it in a thread that runs; it records only between the two signals. Forked sandboxes inherit it.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

OUTPUT_DIR_ENV = "FAASMOE_TRACE_DIR"
PREFIX = "faasmoe_"


class ModuleRecorder:
    """Collects the modules whose functions are called while it records."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._modules: set[str] = set()
        self._is_recording = False

    def profile(self, frame: FrameType, event: str, _arg: Any) -> None:
        """Note the module of a call; a profile function as `sys.setprofile` takes one."""
        if self._is_recording and event == "call":
            name = frame.f_globals.get("__name__", "")
            if name.startswith(PREFIX):
                self._modules.add(name)

    def start(self, _signal_number: int, _frame: FrameType | None) -> None:
        """Record from now on."""
        self._modules = set()
        self._is_recording = True

    def stop(self, _signal_number: int, _frame: FrameType | None) -> None:
        """Stop, and write the names to a file named after the process."""
        self._is_recording = False
        path = self._output_dir / f"{os.getpid()}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(sorted(self._modules)), encoding="utf-8")
        temporary.rename(path)


if OUTPUT_DIR_ENV in os.environ:
    _recorder = ModuleRecorder(Path(os.environ[OUTPUT_DIR_ENV]))
    signal.signal(signal.SIGUSR1, _recorder.start)
    signal.signal(signal.SIGUSR2, _recorder.stop)
    threading.setprofile(_recorder.profile)
    sys.setprofile(_recorder.profile)
