"""Seconds from the start of a process to its first token, of the model that ships.

    python -m benchmarks.startup [--rounds N] [--threads N] [--quick]

Writes benchmarks/results/startup.json and the table in docs/benchmarks.md, with --quick nothing.
"""

from __future__ import annotations

import subprocess
import time
from typing import Any

from benchmarks import harness, table


def seconds(*arguments: str, to_end: bool) -> float:
    """Of `vivace`: to its first byte on stdout, or to the end of the process."""
    start = time.perf_counter()
    with subprocess.Popen(
        [*harness.VIVACE, *arguments], stdout=subprocess.PIPE, bufsize=0, cwd=harness.ROOT
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        if to_end:
            process.communicate()
        taken = time.perf_counter() - start
        process.kill()
    if not first:
        raise RuntimeError(f"vivace {arguments} printed nothing")
    return taken


def measure(threads: int, rounds: int) -> dict[str, Any]:
    """All in turn; the round -1 fills the page cache."""
    first_token: list[float] = []
    help_page: list[float] = []
    for index in range(-1, rounds):
        run = ("run", "tiny", "Hello", "--temperature", "0", "--threads", str(threads))
        taken = seconds(*run, to_end=False), seconds("--help", to_end=True)
        if index >= 0:
            first_token.append(taken[0])
            help_page.append(taken[1])
    return {
        "threads": threads,
        "run_tiny_to_first_token_seconds": harness.summary(first_token),
        "help_seconds": harness.summary(help_page),
    }


def main() -> None:
    options = harness.argument_parser("startup", __doc__, rounds=9).parse_args()
    results = measure(options.threads, 1 if options.is_quick else options.rounds)
    for key, values in results.items():
        if key.endswith("_seconds"):
            print(f"{key.removesuffix('_seconds')}: {values['median']:.3f} s")
    if not options.is_quick:
        print(f"written {harness.save('startup', results)}")
        table.main()


if __name__ == "__main__":
    main()
