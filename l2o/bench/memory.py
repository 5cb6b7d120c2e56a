"""How much memory this process takes at most: so far, and for one piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")


def peak_memory_mb() -> float:
    """Return that of this process so far: the largest resident set, in MB (10^6 bytes); NaN on Windows."""
    # Linux hands `ru_maxrss` on from the process that started this one; the address space's own mark begins at nought.
    with contextlib.suppress(OSError, StopIteration):
        lines = (_PROC / "status").read_text("utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def scratch_bytes(work: Callable[[], Any], device: torch.device) -> float | None:
    """Measure by how much memory rises while ``work``, which has been done before, is done; None where nobody keeps
    count.

    Of a CPU it is the resident set, in whole pages, whose mark begins anew from here.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is used again, and not seen
        (_PROC / "clear_refs").write_text("5", "utf-8")  # sets VmHWM back (proc(5))
    except (OSError, AttributeError, TypeError):  # not Linux, or not glibc
        return None
    mark = peak_memory_mb()
    work()
    return (peak_memory_mb() - mark) * 1e6
