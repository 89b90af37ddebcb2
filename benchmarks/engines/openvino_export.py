"""Run by the Python of `make peers`: optimum-intel compresses a checkpoint for OpenVINO.

    python -m benchmarks.engines.openvino_export CHECKPOINT OUT BITS

As `optimum-cli export openvino --weight-format int4` (or `int8`) does for a model it has no recipe
of its own for: integers with zero points, 4 bits in groups of 128, all matrices but the embedding
and the head, which have 8; 8 bits per row.
"""

from __future__ import annotations

import importlib
import sys

optimum = importlib.import_module("optimum.intel")  # not in the Python that checks types

if __name__ == "__main__":
    checkpoint, out, bits = sys.argv[1:]
    grouping = {"group_size": 128, "ratio": 1.0} if bits == "4" else {}
    config = optimum.OVWeightQuantizationConfig(bits=int(bits), sym=False, **grouping)
    model = optimum.OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, quantization_config=config
    )
    model.save_pretrained(out)
