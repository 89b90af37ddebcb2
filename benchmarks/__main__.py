"""`python -m benchmarks [NAME] [ARGS]`: run one benchmark, or all of them."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (
    "startup",
    "peers",
    "formats",
    "packing",
    "attention",
    "agreement",
    "tokenization",
)

if __name__ == "__main__":
    names = sys.argv[1:2] or BENCHMARKS
    if names[0] not in BENCHMARKS:
        sys.exit(f"no benchmark {names[0]!r}: expected one of {', '.join(BENCHMARKS)}")
    commands = {name: [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[2:]] for name in names}
    failed = [name for name, command in commands.items() if subprocess.run(command).returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
