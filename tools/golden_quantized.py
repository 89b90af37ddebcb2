"""Writes tests/data/quantized.json: matrices as compressed-tensors writes and decompresses them.

    .venv/bin/pip install compressed-tensors==0.20.0 && .venv/bin/python tools/golden_quantized.py

With it, tests compare with compressed-tensors where it is not installed.
"""

from __future__ import annotations

import base64
import importlib
import json
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "quantized.json"
SHAPE = 10, 64
INT = {"type": "int"}
FLOAT = {"type": "float"}
BY_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("pack-quantized", INT | {"num_bits": bits, "symmetric": is_symmetric} | strategy)
        for bits in (3, 4, 8)
        for is_symmetric in (True, False)
        for strategy in ({"strategy": "group", "group_size": 32}, {"strategy": "channel"})
    ),
    *(
        ("int-quantized", INT | {"num_bits": 8, "symmetric": is_symmetric, "strategy": strategy})
        for is_symmetric in (True, False)
        for strategy in ("channel", "tensor")
    ),
    ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "channel"}),
    ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "tensor"}),
    (
        "nvfp4-pack-quantized",
        FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
    ),
    (
        "mxfp4-pack-quantized",
        FLOAT
        | {"num_bits": 4, "strategy": "group", "group_size": 32}
        | {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
    ),
]


def main() -> None:
    quantization = importlib.import_module("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    torch.manual_seed(0)
    cases = []
    for format, fields in CASES:
        weights = quantization.QuantizationArgs(**fields)
        rounds_inputs = format in ("int-quantized", "float-quantized")
        inputs = BY_TOKEN | {"type": fields["type"]}
        scheme = quantization.QuantizationScheme(
            targets=["Linear"],
            weights=weights,
            input_activations=quantization.QuantizationArgs(**inputs) if rounds_inputs else None,
            format=format,
        )
        compressor = compressors.BaseCompressor.get_value_from_registry(format)
        stored = compressor.compress(_calibrated(weights), scheme)
        weight = compressor.decompress(dict(stored), scheme)["weight"].to(torch.bfloat16)
        config = quantization.QuantizationConfig(
            config_groups={"group_0": scheme}, format=format, quantization_status="compressed"
        )
        tensors = {name: _spelled(tensor) for name, tensor in sorted(stored.items())}
        config = json.loads(json.dumps(config.to_dict(), default=str))
        cases.append({"config": config, "tensors": tensors, "weight": _spelled(weight)})
    lines = ",\n".join(json.dumps(case) for case in cases)
    GOLDEN.write_text(f"[\n{lines}\n]\n")


def _calibrated(weights: Any) -> dict[str, torch.Tensor]:
    """A random matrix with scales and zero points from its extremes."""
    parameters = importlib.import_module("compressed_tensors.quantization.utils")
    weight = torch.randn(SHAPE).to(torch.bfloat16)
    tensors, more = {"weight": weight}, {}
    if weights.strategy == "tensor":
        lowest, highest = weight.amin().reshape(1), weight.amax().reshape(1)
    else:
        groups = weight.reshape(SHAPE[0], -1, weights.group_size or SHAPE[1])
        lowest, highest = groups.amin(-1), groups.amax(-1)
    if weights.strategy == "tensor_group":
        extremes = weight.amin().reshape(1), weight.amax().reshape(1)
        more["global_scale"] = parameters.generate_gparam(*extremes)
        tensors["weight_global_scale"] = more["global_scale"]
    scale, zero = parameters.calculate_qparams(lowest, highest, weights, **more)
    return tensors | {"weight_scale": scale, "weight_zero_point": zero}


def _spelled(tensor: torch.Tensor) -> dict[str, Any]:
    flat = tensor.flatten().clone(memory_format=torch.contiguous_format)
    raw = flat.view(torch.uint8).numpy().tobytes()
    name = str(tensor.dtype).removeprefix("torch.")
    return {
        "dtype": name,
        "shape": list(tensor.shape),
        "bytes": base64.b64encode(raw).decode(),
    }


if __name__ == "__main__":
    main()
