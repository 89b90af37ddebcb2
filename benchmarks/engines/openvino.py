"""OpenVINO's stateful model, in the Python of `make peers`.

It runs as in OpenVINO GenAI's pipeline: default options, and logits of the last row alone. States
are set directly, which the pipeline has no call for.
"""

from __future__ import annotations

import importlib
import time
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks import harness

ov = importlib.import_module("openvino")  # not in the Python that checks types
operations = importlib.import_module("openvino.opset13")

SETTINGS = (  # what the defaults amount to
    "INFERENCE_PRECISION_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION",
    "NUM_STREAMS",
    "INFERENCE_NUM_THREADS",
)


class OpenVino:
    def __init__(self, path: str, threads: int, max_context: int) -> None:
        core = ov.Core()
        model = core.read_model(f"{path}/openvino_model.xml")
        _only_last_logits(model)
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(model, "CPU", options)
        self.request = compiled.create_infer_request()
        states = [state.state for state in self.request.query_state()]
        # [sequences, heads, tokens, size]; what quantizes the states' values is not counted.
        entries = sum(state.shape[1] * state.shape[3] for state in states)
        entry_bytes = compiled.get_property("KV_CACHE_PRECISION").size
        self.facts = {
            "version": metadata.version("openvino"),
            "settings": {name: _plain(compiled.get_property(name)) for name in SETTINGS},
            "cache_bytes_per_token": entries * entry_bytes,
        }
        self.noise = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)

    def prefill(self, num_tokens: int, offset: int) -> float:
        self.request.reset_state()
        return self._run(np.array([harness.prompt(num_tokens, offset)]), 0)

    def decode(self, num_sequences: int, context: int, num_steps: int) -> list[float]:
        self.request.reset_state()
        for state in self.request.query_state():
            _, heads, _, size = state.state.shape
            shape = num_sequences, heads, context, size
            state.state = ov.Tensor(np.resize(self.noise, shape))
        tokens = np.arange(num_sequences)[:, None]
        # The first two make room for what follows.
        steps = [self._run(tokens, context + step) for step in range(num_steps + 2)]
        return steps[2:]

    def _run(self, tokens: np.ndarray, start: int) -> float:
        """Seconds of a forward of tokens [sequences, n] that stand from `start` on."""
        count, length = tokens.shape
        positions = np.arange(start, start + length)
        inputs: dict[str, Any] = {
            "input_ids": tokens.astype(np.int64),
            "attention_mask": np.ones((count, start + length), np.int64),
            "position_ids": np.tile(positions.astype(np.int64), (count, 1)),
            "beam_idx": np.arange(count, dtype=np.int32),
        }
        begin = time.perf_counter()
        self.request.infer(inputs, share_inputs=True, share_outputs=True)
        return time.perf_counter() - begin


def _plain(value: Any) -> Any:
    return value.get_type_name() if isinstance(value, ov.Type) else value


def _only_last_logits(model: Any) -> None:
    """Cut the head's input [sequences, n, hidden] down to its last row."""
    head = model.get_results()[0].input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    begin, end, step, axis = (
        operations.constant(np.array([value], np.int64))
        for value in (-1, np.iinfo(np.int64).max, 1, 1)
    )
    last = operations.slice(head.input_value(0), begin, end, step, axis)
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    harness.serve_engine(OpenVino)
