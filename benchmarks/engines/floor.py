"""What this machine can do now, in a process whose buffers count for nobody."""

from __future__ import annotations

import json
import sys

from benchmarks import harness
from vivace import _native


def peak(kind: str, threads: int) -> float | None:
    """Operations per second of registers alone; None where there is no loop of that kind."""
    try:
        return _native.peak_flops(kind, 0.25, threads)
    except ValueError:
        return None


if __name__ == "__main__":
    threads = json.loads(sys.argv[1])["threads"]
    harness.serve(
        {
            "read": lambda: {"bytes_per_second": _native.read_bandwidth(0.25, threads)},
            "peak": lambda kind: {"flops": peak(kind, threads)},
        }
    )
