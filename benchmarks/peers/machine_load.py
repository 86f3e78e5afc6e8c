"""How busy the rest of the machine is while a server is measured."""

from __future__ import annotations

import time

import psutil
from benchmarks.peers.servers import RunningServer, cpu_used_s


class MachineLoad:
    """CPU time of all processes but the server and this one, from now on."""

    def __init__(self, running: RunningServer) -> None:
        self._running = running
        self._started_s = time.perf_counter()
        self._busy_s = _busy_s()
        self._own_s = time.process_time()
        self._server_s = running.read_cpu_s()

    def other_cores(self) -> float:
        """Return the mean number of cores that others used since the start."""
        elapsed_s = time.perf_counter() - self._started_s
        known_s = cpu_used_s(self._server_s, self._running.read_cpu_s())
        known_s += time.process_time() - self._own_s
        return max(0.0, _busy_s() - self._busy_s - known_s) / elapsed_s


def _busy_s() -> float:
    """Return the CPU time of all cores since boot, idle time and hypervisor excluded."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
