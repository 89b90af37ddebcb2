"""transformers, as `generate` runs a model: a cache that grows by concatenation."""

from __future__ import annotations

import time
from importlib import metadata

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks import harness


class Transformers:
    def __init__(self, path: str, threads: int, max_context: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        config = self.config = self.model.config
        entries = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.facts = {
            "version": f"{metadata.version('transformers')}, torch {torch.__version__}",
            "settings": {"attention": config._attn_implementation, "cache": "bfloat16"},
            "cache_bytes_per_token": 2 * entries,
        }

    @torch.inference_mode()
    def prefill(self, num_tokens: int, offset: int) -> float:
        tokens = torch.tensor([harness.prompt(num_tokens, offset)])
        start = time.perf_counter()
        self.model(tokens, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, num_sequences: int, context: int, num_steps: int) -> list[float]:
        cache = self._filled(num_sequences, context)
        token = torch.zeros((num_sequences, 1), dtype=torch.long)
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            logits = self.model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
        return seconds

    def _filled(self, num_sequences: int, context: int) -> DynamicCache:
        """A cache of noise: what it holds does not matter to its cost."""
        cache = DynamicCache(config=self.config)
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        entries = torch.randn((num_sequences, heads, context, size), dtype=torch.bfloat16)
        for layer in range(self.config.num_hidden_layers):
            cache.update(entries, entries.clone(), layer)
        return cache


if __name__ == "__main__":
    harness.serve_engine(Transformers)
