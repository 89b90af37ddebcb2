"""Damage model files at random and see that a loader reads or refuses them, and does nothing else.

    python tools/fuzz_files.py [--loader gguf] [--seconds 60] [--seed 0] [--case INDEX]

A case is a good file of `tests/robustness/mutations.py` with something changed; it follows from the
seed and its index alone. A finding is any exception but ours, a message that is not one short line,
a case that takes seconds, or one that needs gigabytes. Findings are kept in `--output` with their
index; after a crash, the files of the case that crashed are still in its folder `current`.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "robustness")]

from mutations import LOADERS  # noqa: E402

from vivace.errors import VivaceError  # noqa: E402

MEMORY_LIMIT = 3 * 2**30  # of address space; mapped libraries take most of it
HANG_SECONDS = 5
MAX_MESSAGE = 600


class Hang(BaseException):
    """The alarm rang."""


def ring(signal_number: int, frame: FrameType | None) -> None:
    raise Hang(f"still running after {HANG_SECONDS} seconds")


def run_case(loader: str, seed: int, index: int, folder: Path) -> tuple[bool, str | None]:
    """Make and load one case in `folder`: whether it was read, and what is wrong, if anything."""
    make, read = LOADERS[loader]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = make(random.Random(f"{loader} {seed} {index}"), folder)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        read(path)
    except VivaceError as error:
        message = str(error)
        if "\n" in message or len(message) > MAX_MESSAGE:
            return False, f"a message that is not one short line: {message[:200]!r}"
        return False, None
    except (Exception, Hang):
        return False, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True, None


def fuzz(loader: str, seed: int, seconds: float, output: Path) -> int:
    """Run cases until the time is up; returns the number of findings."""
    start = time.monotonic()
    index = num_read = num_findings = 0
    while time.monotonic() - start < seconds:
        is_read, finding = run_case(loader, seed, index, output / "current")
        num_read += is_read
        if finding is not None:
            num_findings += 1
            kept = output / f"{loader}-{seed}-{index}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(output / "current", kept)
            (kept / "finding.txt").write_text(finding)
            print(f"finding: --loader {loader} --seed {seed} --case {index}\n{finding}", flush=True)
        index += 1
    elapsed = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{loader}, seed {seed}: {index} cases in {elapsed:.0f} s ({index / elapsed:.0f}/s), "
        f"{num_read} read, {index - num_read - num_findings} refused, {num_findings} findings; "
        f"peak memory {peak:.0f} MiB"
    )
    shutil.rmtree(output / "current", ignore_errors=True)
    return num_findings


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage model files and load them")
    parser.add_argument("--loader", choices=sorted(LOADERS), action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run one case again and say what it does")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGALRM, ring)
    loaders = options.loader or sorted(LOADERS)
    if options.case is not None:
        outcomes = [
            run_case(loader, options.seed, options.case, options.output / "current")
            for loader in loaders
        ]
        print(*(finding or ("read" if is_read else "refused") for is_read, finding in outcomes))
        return int(any(finding for _, finding in outcomes))
    found = [fuzz(name, options.seed, options.seconds, options.output) for name in loaders]
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
