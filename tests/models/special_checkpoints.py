"""Checkpoints that take more than a config: Gemma 3's wrapper, and families transformers lacks.

Those come from models of it that compute the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

Fields = Mapping[str, Any]
Randomise = Callable[[nn.Module], Any]


WEIGHTS = "model.safetensors"


def write(path: Path, fields: Fields, tensors: Mapping[str, Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(fields)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)


def minicpm(fields: dict[str, Any], randomise: Randomise, path: Path) -> Any:
    """Granite has the same scales under other names, and the scale of the queries as a field."""
    scales = {name: fields.pop(name) for name in ("scale_emb", "scale_depth", "dim_model_base")}
    hidden_size = fields["hidden_size"]
    config = AutoConfig.for_model(
        "granite",
        **fields,
        tie_word_embeddings=True,
        embedding_multiplier=scales["scale_emb"],
        residual_multiplier=scales["scale_depth"] / fields["num_hidden_layers"] ** 0.5,
        logits_scaling=hidden_size / scales["dim_model_base"],
        attention_multiplier=(hidden_size / fields["num_attention_heads"]) ** -0.5,
    )
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    names = ("rope_parameters", "rms_norm_eps", "hidden_act")
    write(
        path,
        fields | scales | {"model_type": "minicpm"} | {n: getattr(config, n) for n in names},
        tensors,
    )
    return model


def mimo(fields: dict[str, Any], randomise: Randomise, path: Path) -> Any:
    """Qwen2 runs as it is; the heads of further tokens only lie beside it."""
    num_heads = fields.pop("num_nextn_predict_layers")
    config = AutoConfig.for_model("qwen2", **fields)
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    tensors, hidden = model.state_dict(), config.hidden_size
    one_layer = {
        name.removeprefix("model.layers.0."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.")
    }
    for name in ("hidden_layernorm", "token_layernorm", "final_layernorm"):
        one_layer[f"{name}.weight"] = torch.ones(hidden)
    one_layer["input_proj.weight"] = torch.zeros(hidden, 2 * hidden)
    more = {
        f"model.mtp_layers.{index}.{name}": tensor.clone()
        for index in range(num_heads)
        for name, tensor in one_layer.items()
    }
    changes = {"model_type": "mimo", "num_nextn_predict_layers": num_heads, "attention_bias": True}
    write(path, config.to_dict() | changes, tensors | more)
    return model


class Nothing(nn.Module):
    """Stands where a Puzzle layer has no attention or no MLP."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        out = torch.zeros_like(hidden_states)
        return (out, None) if self.is_attention else out


class LinearAttention(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        return self.linear_attn(hidden_states), None


class LinearMlp(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_mlp(hidden_states)


def nemotron_nas(fields: dict[str, Any], randomise: Randomise, path: Path) -> Any:
    """A Llama whose layers are changed one by one, as `block_configs` says."""
    own = {"block_configs": fields.pop("block_configs"), "num_key_value_heads": None}
    fields = {name: value for name, value in fields.items() if name not in own}
    config = AutoConfig.for_model("llama", **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    unused: list[str] = []
    for index, block in enumerate(own["block_configs"]):
        layer, prefix = model.model.layers[index], f"model.layers.{index}"
        layer.self_attn = _attention(config, block["attention"], index)
        layer.mlp = _mlp(config, block["ffn"])
        if block["attention"]["no_op"]:
            unused.append(f"{prefix}.input_layernorm.weight")
        if block["ffn"]["no_op"]:
            unused.append(f"{prefix}.post_attention_layernorm.weight")
    randomise(model)
    tensors = {k: v for k, v in model.state_dict().items() if k not in unused}
    write(path, config.to_dict() | own | {"model_type": "nemotron-nas"}, tensors)
    return model


def _attention(config: Any, choice: Fields, index: int) -> nn.Module:
    if choice["no_op"]:
        return Nothing(is_attention=True)
    if choice["replace_with_linear"]:
        return LinearAttention(config.hidden_size)
    own = copy.deepcopy(config)
    own.num_key_value_heads = config.num_attention_heads // choice["n_heads_in_group"]
    return LlamaAttention(own, index)


def _mlp(config: Any, choice: Fields) -> nn.Module:
    if choice["no_op"]:
        return Nothing(is_attention=False)
    if choice["replace_with_linear"]:
        return LinearMlp(config.hidden_size)
    own = copy.deepcopy(config)
    size = int(2 * choice["ffn_mult"] * config.hidden_size / 3)
    own.intermediate_size = (size + 255) // 256 * 256
    return LlamaMLP(own)


def gemma3(fields: dict[str, Any], randomise: Randomise, path: Path) -> Any:
    """With a vision tower, which text does not reach."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 28}
    vision |= {"num_attention_heads": 1, "patch_size": 14}
    config = Gemma3Config(text_config=fields, vision_config=vision, mm_tokens_per_image=4)
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.save_pretrained(path)
    return model


SPECIAL = {"minicpm": minicpm, "mimo": mimo, "nemotron_nas": nemotron_nas, "gemma3": gemma3}
