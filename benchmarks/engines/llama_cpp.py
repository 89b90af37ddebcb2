"""llama.cpp through llama-cpp-python's low-level API, in the Python of `make peers`.

Caches are of 16 bits and weights are repacked for this machine, as by default.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from importlib import metadata
from typing import Any

from benchmarks import harness

llama = importlib.import_module("llama_cpp")  # not in the Python that checks types

CHUNK = 512  # rows of a prompt that run at once
_quiet = llama.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    def __init__(self, path: str, threads: int, max_context: int) -> None:
        llama.llama_log_set(_quiet, None)
        llama.llama_backend_init()
        self.threads = threads
        self.model = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.prompts = Cache(self, 1, CHUNK)
        self.caches: dict[tuple[int, int], Cache] = {}
        model = self.model
        size = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
        entries = 2 * llama.llama_model_n_layer(model) * llama.llama_model_n_head_kv(model) * size
        self.facts = {
            "version": f"llama-cpp-python {metadata.version('llama_cpp_python')}",
            "settings": {"built_for": llama.llama_print_system_info().decode(), "cache": "float16"},
            "cache_bytes_per_token": 2 * entries,
        }

    def prefill(self, num_tokens: int, offset: int) -> float:
        cache = self.prompts
        cache.shorten(0)
        start = time.perf_counter()
        cache.run([(0, i, token) for i, token in enumerate(harness.prompt(num_tokens, offset))])
        return time.perf_counter() - start

    def decode(self, num_sequences: int, context: int, num_steps: int) -> list[float]:
        key = num_sequences, context
        if key not in self.caches:
            self.caches[key] = Cache(self, num_sequences, context + 64)
            self.caches[key].fill(context)
        cache = self.caches[key]
        seconds = []
        for step in range(num_steps):
            rows = [(sequence, context + step, 1 + step) for sequence in range(num_sequences)]
            start = time.perf_counter()
            cache.run(rows, all_logits=True)
            seconds.append(time.perf_counter() - start)
        cache.shorten(context)
        return seconds


class Cache:
    """A context of llama.cpp: sequences of up to `length` tokens each."""

    def __init__(self, engine: LlamaCpp, num_sequences: int, length: int) -> None:
        self.num_sequences = num_sequences
        params = llama.llama_context_default_params()
        # A long sequence is put together from a second one, which shares its memory.
        params.kv_unified = num_sequences == 1
        params.n_seq_max = max(num_sequences, 2)
        params.n_ctx = num_sequences * (-(-length // 256) * 256)
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = engine.threads
        self.context = llama.llama_init_from_model(engine.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(CHUNK, 0, 1)

    def run(self, rows: list[tuple[int, int, int]], all_logits: bool = False) -> None:
        """Run rows of (sequence, position, token), with the logits of all or the last."""
        batch: Any = self.batch
        for index, (sequence, position, token) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = all_logits or index == len(rows) - 1
        batch.n_tokens = len(rows)
        if llama.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama.cpp does not run the batch")
        llama.llama_synchronize(self.context)

    def fill(self, context: int) -> None:
        """Bring every sequence to `context` tokens.

        One chunk is computed; the others are copies of it, of a long sequence at shifted positions:
        the values differ from a real text's, the cost of reading them does not.
        """
        chunk = min(context, CHUNK)
        self.run([(0, i, token) for i, token in enumerate(harness.prompt(chunk, 0))])
        size = llama.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        llama.llama_state_seq_get_data(self.context, state, size, 0)
        for start in range(chunk, context, chunk):
            self._restore(state, 1)
            llama.llama_memory_seq_rm(self.memory, 1, context - start, -1)
            llama.llama_memory_seq_add(self.memory, 1, 0, -1, start)
            llama.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(self.memory, 1, -1, -1)
        for sequence in range(1, self.num_sequences):
            self._restore(state, sequence)
        for sequence in range(self.num_sequences):
            last = llama.llama_memory_seq_pos_max(self.memory, sequence)
            if last != context - 1:
                raise RuntimeError(f"llama.cpp holds {last + 1} tokens: expected {context}")

    def _restore(self, state: Any, sequence: int) -> None:
        if not llama.llama_state_seq_set_data(self.context, state, len(state), sequence):
            raise RuntimeError("llama.cpp does not restore a sequence")

    def shorten(self, length: int) -> None:
        for sequence in range(self.num_sequences):
            llama.llama_memory_seq_rm(self.memory, sequence, length, -1)


if __name__ == "__main__":
    harness.serve_engine(LlamaCpp)
