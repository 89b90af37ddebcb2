"""`python -m benchmarks [NAME] [ARGS]`: run one benchmark, or all of them."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("core", "peers", "agreement", "tokenization")

if __name__ == "__main__":
    names = sys.argv[1:2] or BENCHMARKS
    if names[0] not in BENCHMARKS:
        sys.exit(f"no benchmark {names[0]!r}: expected one of {', '.join(BENCHMARKS)}")
    for name in names:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[2:]], check=True)
