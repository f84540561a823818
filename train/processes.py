"""Worker processes of a command, and how much memory one has taken."""

from __future__ import annotations

import os
import sys
from multiprocessing import parent_process
from threading import Thread

import psutil


def end_with_command() -> None:
    """In a worker: end as soon as the command does that started it, also when that was killed."""
    command = parent_process()
    assert command is not None

    def leave() -> None:
        command.join()
        os._exit(1)

    Thread(target=leave, daemon=True).start()


def peak_memory() -> int:
    """Bytes that this process has held at most so far."""
    if sys.platform == "linux":
        # The resource module would count the process that started this one too.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
