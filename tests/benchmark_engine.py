"""An engine for tests of the benchmarks: it answers at once, and ends or fails when it is told to.

python -m tests.benchmark_engine OPTIONS
"""

from __future__ import annotations

import os
import signal
from typing import Any

from benchmarks import harness

SECONDS = 0.25  # of every prompt and step
WEIGHT_BYTES, CACHE_BYTES_PER_TOKEN = 1000, 10


class FakeEngine:
    def __init__(self, killed_at: int | None = None, fails_at: int | None = None) -> None:
        self.killed_at, self.fails_at = killed_at, fails_at  # decodes before it happens
        self.num_decodes = 0
        self.facts: dict[str, Any] = {
            "version": "1",
            "settings": {},
            "weight_bytes": WEIGHT_BYTES,
            "cache_bytes_per_token": CACHE_BYTES_PER_TOKEN,
        }

    def prefill(self, num_tokens: int, offset: int) -> float:
        return SECONDS

    def decode(self, num_sequences: int, context: int, num_steps: int) -> list[float]:
        if self.num_decodes == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.num_decodes == self.fails_at:
            raise ValueError("cannot read /home/somebody/models/model.bin.\n")
        self.num_decodes += 1
        return [SECONDS] * num_steps


if __name__ == "__main__":
    harness.serve_engine(FakeEngine)
