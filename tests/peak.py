"""The peak of this process's memory, for scripts that tests start."""

from __future__ import annotations

import sys


def peak_bytes() -> int:
    """What the process has held at most so far."""
    if sys.platform == "linux":
        # The resource module would count the process that started this one too.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
