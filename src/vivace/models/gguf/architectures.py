"""What each architecture name of a GGUF file means: a family, and its config from the metadata.

The keys and their defaults are those that llama.cpp reads (src/llama-arch.cpp, src/models).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vivace.errors import BadFile, UnsupportedModel, nearest
from vivace.models.config import REQUIRED, Config
from vivace.models.families._decoder import MAX_LAYERS

__all__ = ["ARCHITECTURES", "Architecture", "Metadata", "architecture_of", "config_from_metadata"]

Arrays = Mapping[str, np.ndarray]


class Metadata:
    """Typed reads of the keys under an architecture's name; every wrong value is named by its key.

    Args:
        values: all metadata of the file.
        architecture: the prefix of the keys.
        tensors: the names of the file's tensors.
        source: what to call the file in messages.
    """

    def __init__(
        self, values: Mapping[str, Any], architecture: str, tensors: Collection[str], source: str
    ) -> None:
        self.architecture, self.tensors = architecture, tensors
        self.source = f"{source}: metadata"
        self._config = Config(values, self.source)

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        return self._config.has(self._key(name))

    def bad(self, name: str, wanted: str) -> Exception:
        return self._config.bad(self._key(name), wanted)

    def given(self, name: str) -> Any:
        """A value as it is, None where there is none."""
        return self._config.values.get(self._key(name))

    def integer(
        self, name: str, default: Any = REQUIRED, low: int = 1, high: int = 2**31 - 1
    ) -> Any:
        return self._config.integer(self._key(name), default, low=low, high=high)

    def num_layers(self) -> int:
        return self.integer("block_count", high=MAX_LAYERS)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        return self._config.number(self._key(name), default)

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        return self._config.text(self._key(name), default)

    def per_layer(self, name: str, count: int, default: Any = REQUIRED) -> list[int]:
        """One number for all layers, or a list with one for each; 0 means there is none."""
        value = self.given(name)
        if not isinstance(value, list | np.ndarray):
            return [self.integer(name, default, low=0)] * count
        items = [int(item) for item in value if _is_whole(item)]
        if len(items) != count or len(value) != count:
            raise self.bad(name, f"a whole number from 0 on, or {count} of them")
        return items

    def same(self, name: str, count: int, default: Any = REQUIRED) -> int:
        """One number of at least 1 for all layers, however it is stored."""
        items = set(self.per_layer(name, count, default))
        if len(items) > 1:
            raise UnsupportedModel(
                f"{self.source}: {self._key(name)} differs from layer to layer, which "
                f"'{self.architecture}' models do not: expected one number"
            )
        (value,) = items
        if value < 1:
            raise self.bad(name, "a whole number from 1 on")
        return value


def _is_whole(item: Any) -> bool:
    is_number = isinstance(item, int | np.integer) and not isinstance(item, bool)
    return is_number and 0 <= int(item) < 2**31


@dataclass(frozen=True)
class Architecture:
    """A family's form in GGUF.

    Args:
        model_type: the family.
        fields: config fields that only this architecture has, from its metadata and the
            common fields.
        rotates_pairs: the rows of queries and keys are stored in the order in which the rotary
            pairs are neighbours.
        has_post_norms: layers have norms behind attention and MLP.
    """

    model_type: str
    fields: Callable[[Metadata, Mapping[str, Any]], dict[str, Any]] = lambda metadata, common: {}
    rotates_pairs: bool = False
    has_post_norms: bool = False


def architecture_of(metadata: Mapping[str, Any], source: str) -> str:
    """The name of a supported architecture. Raises `BadFile`, `UnsupportedModel`."""
    name = Config(metadata, f"{source}: metadata").text("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{source}: architecture '{name}' is not supported: {nearest(name, ARCHITECTURES)}"
        )
    return name


def config_from_metadata(
    values: Mapping[str, Any], tensors: Collection[str], factors: Arrays, source: str
) -> Config:
    """The config that the family reads.

    Args:
        values: the file's metadata.
        tensors: the names of its tensors.
        factors: the file's rope factors, each [rotary_dim / 2] float32, by tensor name.
        source: what to call the file in messages.
    Raises:
        BadFile: a key is missing or wrong.
        UnsupportedModel: an architecture or a value that is not supported.
    """
    name = architecture_of(values, source)
    metadata = Metadata(values, name, tensors, source)
    architecture = ARCHITECTURES[name]
    fields = {"model_type": architecture.model_type}
    if name == "gpt2":
        fields |= _gpt2(metadata)
    else:
        fields |= _common(metadata)
        fields |= _rope(metadata, fields, factors)
        fields |= architecture.fields(metadata, fields)
    tokens = values.get("tokenizer.ggml.tokens")
    size = metadata.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    if size is None:
        raise metadata.bad("vocab_size", "a whole number, or tokenizer.ggml.tokens beside it")
    fields["vocab_size"] = size
    for role in ("eos", "bos"):
        token_id = values.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None:
            fields[f"{role}_token_id"] = token_id
    return Config(fields, f"{source}: metadata")


def _common(metadata: Metadata) -> dict[str, Any]:
    """The fields that Llama and its relatives share."""
    num_layers = metadata.num_layers()
    hidden_size = metadata.integer("embedding_length")
    num_heads = max(metadata.per_layer("attention.head_count", num_layers))
    if num_heads < 1:
        raise metadata.bad("attention.head_count", "a whole number from 1 on")
    head_dim = metadata.integer("attention.key_length", max(1, hidden_size // num_heads))
    value_dim = metadata.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModel(
            f"{metadata.architecture}.attention.value_length is {value_dim} but key_length "
            f"{head_dim}: values of another size than keys are not supported"
        )
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        "lm_head_bias": "output.bias" in metadata.tensors,
        "attention_bias": "blk.0.attn_output.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in metadata.tensors,
    } | _sizes(metadata, num_layers, num_heads)


def _sizes(metadata: Metadata, num_layers: int, num_heads: int) -> dict[str, Any]:
    if metadata.architecture == "deci":
        return {"block_configs": _deci_blocks(metadata, num_layers)}
    metadata.same("attention.head_count", num_layers)
    return {
        "num_key_value_heads": metadata.same("attention.head_count_kv", num_layers, num_heads),
        "intermediate_size": metadata.same("feed_forward_length", num_layers),
    }


def _deci_blocks(metadata: Metadata, num_layers: int) -> list[dict[str, Any]]:
    """Per layer: no query heads, no attention; query heads without key heads, a single matrix."""
    hidden_size = metadata.integer("embedding_length")
    heads = metadata.per_layer("attention.head_count", num_layers)
    kv_heads = metadata.per_layer("attention.head_count_kv", num_layers)
    sizes = metadata.per_layer("feed_forward_length", num_layers)
    blocks = []
    for num_heads, num_kv_heads, size in zip(heads, kv_heads, sizes, strict=True):
        if num_kv_heads and num_heads % num_kv_heads:
            raise metadata.bad("attention.head_count_kv", "numbers that divide the head counts")
        if size % 256:
            raise metadata.bad("feed_forward_length", "multiples of 256")
        attention = {
            "no_op": num_heads == 0,
            "replace_with_linear": num_heads > 0 and num_kv_heads == 0,
            "n_heads_in_group": num_heads // num_kv_heads if num_kv_heads else None,
        }
        # The factor that the family turns back into this size, whatever it is rounded to.
        mlp = {"no_op": size == 0, "ffn_mult": 3 * (size - 0.5) / (2 * hidden_size)}
        blocks.append({"attention": attention, "ffn": mlp})
    return blocks


# ---------------------------------------------------------------- rope


def _rope(metadata: Metadata, fields: Mapping[str, Any], factors: Arrays) -> dict[str, Any]:
    """The rope's fields. Factors per frequency are stored as tensors, whatever made them."""
    rotary_dim = metadata.integer("rope.dimension_count", fields["head_dim"])
    if rotary_dim > fields["head_dim"]:
        raise metadata.bad("rope.dimension_count", f"at most the head size {fields['head_dim']}")
    context = metadata.integer("rope.scaling.original_context_length", None)
    context = context or fields["max_position_embeddings"]
    kind = metadata.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(
            f"{metadata.architecture}.rope.scaling.type is '{kind}': expected none, linear, yarn "
            "or longrope"
        )
    name = "rope.scaling.factor" if metadata.has("rope.scaling.factor") else "rope.scale_linear"
    is_scaled = kind != "none" and metadata.given(name) != 0  # zero means unset
    factor = metadata.number(name, 1.0) if is_scaled else 1.0
    temperature = metadata.number("rope.scaling.attn_factor", 1.0)
    scaling: dict[str, Any] | None = None
    if factors:
        short, long = (_factors(metadata, factors, length) for length in ("short", "long"))
        scaling = {
            "rope_type": "longrope",
            "short_factor": [item * factor for item in short],
            "long_factor": [item * factor for item in long],
            "attention_factor": temperature,
            "original_max_position_embeddings": context,
        }
    elif kind == "yarn":
        grown = temperature * (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0)
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": context,
            "attention_factor": grown,
            "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    elif factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    share = (
        {}
        if rotary_dim == fields["head_dim"]
        else {"partial_rotary_factor": rotary_dim / fields["head_dim"]}
    )
    base = metadata.number("rope.freq_base", 10_000.0)
    return {"rope_theta": base, "rope_scaling": scaling} | share


def _factors(metadata: Metadata, factors: Arrays, length: str) -> list[float]:
    name = f"rope_factors_{length}.weight"
    chosen = factors.get("rope_freqs.weight", factors.get(name))
    if chosen is None:
        raise BadFile(
            f"{metadata.source}: tensor '{name}' is missing: expected it beside the other one"
        )
    return [float(item) for item in chosen]


# ---------------------------------------------------------------- what single architectures add


def _gpt2(metadata: Metadata) -> dict[str, Any]:
    num_layers, hidden_size = metadata.num_layers(), metadata.integer("embedding_length")
    return {
        "n_layer": num_layers,
        "n_embd": hidden_size,
        "n_head": metadata.same("attention.head_count", num_layers),
        "n_positions": metadata.integer("context_length"),
        "n_inner": metadata.same("feed_forward_length", num_layers, 4 * hidden_size),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
    }


def _llama(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    """Llama, Mistral and Mixtral share a name; a window is what tells Mistral."""
    window = metadata.integer("attention.sliding_window", 0, low=0) or None
    if not metadata.integer("expert_count", 0, low=0):
        return {"model_type": "mistral", "sliding_window": window} if window else {}
    experts = _experts(metadata, "num_local_experts")
    return {"model_type": "mixtral", "sliding_window": window} | experts


def _experts(metadata: Metadata, count_field: str) -> dict[str, Any]:
    count, used = metadata.integer("expert_count"), metadata.integer("expert_used_count")
    if used > count:
        raise metadata.bad("expert_used_count", f"at most the {count} experts")
    return {count_field: count, "num_experts_per_tok": used}


def _qwen_experts(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    experts = _experts(metadata, "num_experts")
    size = common["intermediate_size"]
    each = max(1, size // experts["num_experts_per_tok"])
    return experts | {
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length", each),
        "shared_expert_intermediate_size": metadata.integer(
            "expert_shared_feed_forward_length", size
        ),
        "norm_topk_prob": metadata.architecture == "qwen3moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _olmoe(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    return _experts(metadata, "num_experts") | {"norm_topk_prob": False}


def _phi3(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": metadata.integer("attention.sliding_window", 0, low=0) or None}


def _phimoe(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    return _experts(metadata, "num_local_experts") | _phi3(metadata, common)


def _layer_kinds(metadata: Metadata, num_layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th layer reads all of the past; or a list says which read a window."""
    given = metadata.given("attention.sliding_window_pattern")
    if isinstance(given, list | np.ndarray):
        if len(given) != num_layers:
            raise metadata.bad("attention.sliding_window_pattern", f"{num_layers} booleans")
        has_window = [bool(item) for item in given]
    else:
        pattern = metadata.integer("attention.sliding_window_pattern", pattern)
        has_window = [layer % pattern < pattern - 1 for layer in range(num_layers)]
    return ["sliding_attention" if item else "full_attention" for item in has_window]


def _gemma(metadata: Metadata, common: Mapping[str, Any], layers_of_27b: int) -> dict[str, Any]:
    is_27b = common["num_hidden_layers"] == layers_of_27b
    even = common["hidden_size"] // common["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": even if is_27b else common["head_dim"],
    }


def _gemma2(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma(metadata, common, 46) | {
        "sliding_window": metadata.integer("attention.sliding_window", 4096),
        "layer_types": _layer_kinds(metadata, common["num_hidden_layers"], 2),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    num_layers = common["num_hidden_layers"]
    window = metadata.integer("attention.sliding_window", 0, low=0) or None
    kinds = _layer_kinds(metadata, num_layers, 6)
    return _gemma(metadata, common, 62) | {
        "sliding_window": window,
        "layer_types": kinds if window else ["full_attention"] * num_layers,
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", None),
    }


def _minicpm(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    """Older files leave out the scales, which are then those of MiniCPM 1."""
    root = math.sqrt(common["num_hidden_layers"])
    hidden_size = common["hidden_size"]
    return {
        "scale_emb": metadata.number("embedding_scale", 12.0),
        "scale_depth": metadata.number("residual_scale", 1.4 / root) * root,
        "dim_model_base": hidden_size / metadata.number("logit_scale", hidden_size / 256),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _llama, rotates_pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe", _qwen_experts),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", _qwen_experts),
    "gemma2": Architecture("gemma2", _gemma2, has_post_norms=True),
    "gemma3": Architecture("gemma3_text", _gemma3, has_post_norms=True),
    "phi3": Architecture("phi3", _phi3),
    "phimoe": Architecture("phimoe", _phimoe),
    "gpt2": Architecture("gpt2"),
    "olmo2": Architecture("olmo2", has_post_norms=True),
    "olmoe": Architecture("olmoe", _olmoe),
    "smollm3": Architecture("smollm3", rotates_pairs=True),
    "minicpm": Architecture("minicpm", _minicpm, rotates_pairs=True),
    "deci": Architecture("nemotron-nas", rotates_pairs=True),
}
