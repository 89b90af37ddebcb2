"""Vivace. Its times include scheduling and sampling."""

from __future__ import annotations

import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import harness
from vivace import LLM, SamplingParams
from vivace.engine.request import Event, Request


class Vivace:
    def __init__(self, path: str, threads: int, max_context: int, weights: Any = None) -> None:
        self.llm = LLM(
            path,
            weights=weights,
            kv="bfloat16",
            threads=threads,
            max_context=max_context,
            weight_cache=Path(path).parent / "packed",
        )
        executor, size = self.llm.engine.executor, self.llm.engine.pool.block_size
        groups = range(len(self.llm.graph.groups))
        self.facts = {
            "version": metadata.version("vivace"),
            "settings": {"cache": "bfloat16"},
            "weight_bytes": self.llm.weight_bytes,
            "cache_bytes": self.llm.cache_bytes,
            "cache_bytes_per_token": sum(executor.bytes_per_block(g, size) for g in groups) / size,
        }

    def prefill(self, num_tokens: int, offset: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        return self.llm.generate(harness.prompt(num_tokens, offset), params).timing.prefill_seconds

    def decode(self, num_sequences: int, context: int, num_steps: int) -> list[float]:
        """The prompts are the same each time, so that the prefix cache has them from then on."""
        engine = self.llm.engine
        num_tokens = [0] * num_sequences

        def count(index: int, event: Event) -> None:
            num_tokens[index] += len(event.token_ids)

        # Sequences of a new batch go on while others are still in their prompts.
        most = num_steps + num_sequences + 2
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        request_ids = [
            engine.add(Request.of(harness.prompt(context, index), params), partial(count, index))
            for index in range(num_sequences)
        ]
        while not all(num_tokens):
            engine.step()
        before = sum(num_tokens)
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
        if sum(num_tokens) - before != num_steps * num_sequences:
            raise RuntimeError("a step did not add one token to every sequence")
        for request_id in request_ids:
            engine.cancel(request_id)
        engine.run_until_done()
        return seconds


if __name__ == "__main__":
    harness.serve_engine(Vivace)
