"""Random-weight models of well-known shapes, written once to a scratch folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

QWEN_2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes of a tied Llama or Qwen2; the latter has biases on Q, K and V."""
    d, m = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (d,),
            p + "self_attn.q_proj.weight": (q, d),
            p + "self_attn.k_proj.weight": (kv, d),
            p + "self_attn.v_proj.weight": (kv, d),
            p + "self_attn.o_proj.weight": (d, q),
            p + "post_attention_layernorm.weight": (d,),
            p + "mlp.gate_proj.weight": (m, d),
            p + "mlp.up_proj.weight": (m, d),
            p + "mlp.down_proj.weight": (d, m),
        }
        if config["model_type"] == "qwen2":
            shapes |= {
                p + f"self_attn.{part}_proj.bias": (size,)
                for part, size in (("q", q), ("k", kv), ("v", kv))
            }
    return shapes | {"model.norm.weight": (d,)}


def matrices(config: dict) -> dict[str, tuple[int, ...]]:
    """Those that every row of a prompt is multiplied with: all but the head."""
    shapes = tensor_shapes(config).items()
    return {name: s for name, s in shapes if len(s) == 2 and "embed" not in name}


def operations(config: dict, num_rows: int) -> int:
    """Multiplications and additions of a prompt's matrix products, the head's for its last row."""
    body = sum(math.prod(shape) for shape in matrices(config).values())
    return 2 * (num_rows * body + config["vocab_size"] * config["hidden_size"])


def write_checkpoint(folder: Path, config: dict, seed: int = 0) -> Path:
    """A bfloat16 checkpoint with weights of standard deviation 0.02; returns the folder."""
    from safetensors.numpy import save_file

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # One large block of noise, cut at random places: fast to make, and no two matrices are equal.
    rng = np.random.default_rng(seed)
    noise = (rng.standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, ml_dtypes.bfloat16)
            continue
        size = math.prod(shape)
        start = int(rng.integers(len(noise)))
        tensors[name] = np.resize(np.roll(noise, -start), size).reshape(shape)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
