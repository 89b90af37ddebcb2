"""Attention against the read and multiply floors, and the sampler against 1% of a decode step.

    python -m benchmarks.attention [--rounds N] [--threads N] [--quick]

One layer of Llama-3.2-1B's attention at a time, random keys and values, blocks in random order.
Decoding goes round layers that together do not fit in any cache, as the layers of a model do. Each
figure is taken between two measurements of its floor in the same process; the floor is their mean.
The sampler draws from rows as a model gives them (a few likely tokens over a noise floor) and from
flat ones, 152k tokens each; a step is that of a model of 0.3 GB at 50 GB/s, 6 ms. Writes
benchmarks/results/attention.json and the tables in docs/benchmarks.md; with --quick contexts are
short and nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import harness, table
from vivace import _native
from vivace.executors.native import flatten
from vivace.types import GroupRows, Segment, Span

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 64, 16
KV_STORES = {"float32": 4, "bfloat16": 2}
PREFILL_ROWS = 512
COLD_BYTES = 256 << 20  # more than a shared cache holds
VOCAB, NUM_LOGITS_ROWS, STEP_SECONDS = 151_936, 8, 0.006
SAMPLERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "repetition penalty 1.1": {"repetition_penalty": 1.1},
    "log-probabilities, top 5": {"logprobs": 5},
}


@dataclass(frozen=True)
class Sizes:
    """What is measured: sequences and context of decodes, entries before the rows of a prefill."""

    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[int, ...]
    rounds: int


FULL = Sizes(((1, 4096), (1, 16384), (1, 32768), (8, 4096)), (0, 4096, 16384, 32768), 7)
QUICK = Sizes(((1, 1024), (8, 1024)), (0, 1024), 1)


class Layer:
    """A cache of `num_sequences` sequences, and a step's rows that read them."""

    def __init__(
        self, kv_store: str, num_sequences: int, num_entries: int, rows: int, threads: int
    ) -> None:
        random = np.random.default_rng(0)
        blocks_each = -(-num_entries // BLOCK_SIZE)
        num_blocks = num_sequences * blocks_each
        self._attention = _native.Attention(
            kv_store, NUM_KV_HEADS, HEAD_DIM, num_blocks, BLOCK_SIZE, None, threads
        )
        shape = (BLOCK_SIZE * 64, NUM_KV_HEADS, HEAD_DIM)
        keys, values = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        for first in range(0, num_blocks * BLOCK_SIZE, len(keys)):
            slots = np.arange(first, min(first + len(keys), num_blocks * BLOCK_SIZE))
            self._attention.write(slots, keys[: len(slots)], values[: len(slots)])
        block_ids = random.permutation(num_blocks).astype(np.int32).reshape(num_sequences, -1)
        each = rows // num_sequences
        self._group = flatten(
            GroupRows(
                np.zeros(rows, np.int64),
                tuple(
                    Span(i * each, each, (Segment(ids, num_entries),))
                    for i, ids in enumerate(block_ids)
                ),
            )
        )
        self._queries = random.standard_normal((rows, NUM_HEADS, HEAD_DIM)).astype(np.float32)
        positions = np.arange(num_entries - each, num_entries)
        self._positions = np.tile(positions, num_sequences).astype(np.int32)

    def run(self) -> None:
        self._attention(self._queries, self._positions, self._group, HEAD_DIM**-0.5)


def repeat(
    run: Callable[[], None], count: int, measure_floor: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of one of `count` calls, and the floor around them, per round."""
    seconds, floors = [], []
    run()
    for _ in range(rounds):
        before = measure_floor()
        start = time.perf_counter()
        for _ in range(count):
            run()
        seconds.append((time.perf_counter() - start) / count)
        floors.append((before + measure_floor()) / 2)
    return seconds, floors


def decode(
    kv_store: str, num_sequences: int, context: int, threads: int, rounds: int
) -> dict[str, Any]:
    cache_bytes = 2 * num_sequences * context * NUM_KV_HEADS * HEAD_DIM * KV_STORES[kv_store]
    layers = [
        Layer(kv_store, num_sequences, context, num_sequences, threads)
        for _ in range(max(2, -(-COLD_BYTES // cache_bytes)))
    ]

    def run() -> None:
        for layer in layers:
            layer.run()

    seconds, floors = repeat(run, 2, lambda: _native.read_bandwidth(0.1, threads), rounds)
    seconds = [value / len(layers) for value in seconds]
    share = [cache_bytes / s / floor for s, floor in zip(seconds, floors, strict=True)]
    return {
        "cache_bytes": cache_bytes,
        "layer_seconds": harness.summary(seconds),
        "read_bandwidth_bytes_per_second": harness.summary(floors),
        "share_of_read_floor": harness.summary(share),
    }


def prefill(kv_store: str, context: int, threads: int, rounds: int) -> dict[str, Any]:
    layer = Layer(kv_store, 1, context + PREFILL_ROWS, PREFILL_ROWS, threads)
    pairs = PREFILL_ROWS * context + PREFILL_ROWS * (PREFILL_ROWS + 1) // 2
    operations = 4 * pairs * NUM_HEADS * HEAD_DIM
    seconds, floors = repeat(
        layer.run, 1, lambda: _native.peak_flops("float32", 0.1, threads), rounds
    )
    share = [operations / s / floor for s, floor in zip(seconds, floors, strict=True)]
    return {
        "layer_seconds": harness.summary(seconds),
        "operations_per_second": harness.summary([operations / s for s in seconds]),
        "peak_float32_flops": harness.summary(floors),
        "share_of_peak": harness.summary(share),
    }


def make_logits() -> dict[str, np.ndarray]:
    """Rows as of a model in the middle of a text, and flat ones."""
    random = np.random.default_rng(0)
    flat = random.standard_normal((NUM_LOGITS_ROWS, VOCAB)).astype(np.float32) * 3
    peaked = flat.copy()
    for row in peaked:
        row[random.integers(0, VOCAB, 40)] += np.linspace(20, 6, 40, dtype=np.float32)
    return {"peaked": peaked, "flat": flat}


def sampler(
    logits: np.ndarray, options: dict[str, float], rows: int, threads: int, rounds: int
) -> dict[str, Any]:
    """Seconds per token; a call draws for `rows` rows."""
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature")
    names = (*names, "typical_p", "top_p", "min_p", "top_k")
    values = dict.fromkeys(names, 0.0) | {"repetition_penalty": 1.0, "temperature": 1.0}
    values |= {"typical_p": 1.0, "top_p": 1.0} | options
    table = np.array([[values[name] for name in names]] * rows)
    history = None
    if "repetition_penalty" in options:
        tokens = np.random.default_rng(1).integers(0, VOCAB, 1000 * rows).astype(np.int32)
        lengths = np.full(rows, 500, np.int64)
        history = (np.arange(rows + 1, dtype=np.int64) * 1000, lengths, tokens)
    num_top = int(options["logprobs"]) if "logprobs" in options else None
    calls = 32 * NUM_LOGITS_ROWS // rows
    seconds = []
    for index in range(-1, rounds):
        start = time.perf_counter()
        for call in range(calls):
            first = call * rows % NUM_LOGITS_ROWS
            keys = np.array([[index + 1, call, row, 0] for row in range(rows)], np.uint64)
            part = logits[first : first + rows]
            _native.sample(part, table, keys, history, None, None, num_top, threads)
        if index >= 0:
            seconds.append((time.perf_counter() - start) / calls / rows)
    return {
        "token_seconds": harness.summary(seconds),
        "share_of_step": harness.summary([value / STEP_SECONDS for value in seconds]),
    }


def measure(threads: int, sizes: Sizes) -> dict[str, Any]:
    rounds = sizes.rounds
    results: dict[str, Any] = {"threads": threads, "decode": {}, "prefill": {}, "sampler": {}}

    def note(group: str, name: str, result: dict[str, Any], share: str) -> None:
        results[group][name] = result
        seconds = next(iter(v for k, v in result.items() if k.endswith("_seconds")))["median"]
        print(f"{group} {name}: {seconds * 1e6:.0f} us, {result[share]['median']:.1%}", flush=True)

    for kv_store in KV_STORES:
        for num_sequences, context in sizes.decodes:
            result = decode(kv_store, num_sequences, context, threads, rounds)
            name = f"{kv_store}, {num_sequences} at {context}"
            note("decode", name, result, "share_of_read_floor")
        for context in sizes.prefills:
            result = prefill(kv_store, context, threads, rounds)
            note("prefill", f"{kv_store}, after {context}", result, "share_of_peak")
    keeper = Layer("float32", 1, 16, 1, threads)  # keeps the threads, as an executor does
    for kind, logits in make_logits().items():
        for name, options in SAMPLERS.items():
            for rows in (1, NUM_LOGITS_ROWS):
                result = sampler(logits, options, rows, threads, rounds)
                note("sampler", f"{kind}, {name}, {rows} rows", result, "share_of_step")
    keeper.run()
    return results


def main() -> None:
    options = harness.argument_parser("attention", __doc__, rounds=FULL.rounds).parse_args()
    sizes = QUICK if options.is_quick else replace(FULL, rounds=options.rounds)
    results = measure(options.threads, sizes)
    if not options.is_quick:
        print(f"written {harness.save('attention', results)}")
        table.main()


if __name__ == "__main__":
    main()
