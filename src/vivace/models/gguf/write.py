"""A loaded model as a GGUF file, which other programs of that format read.

What is written is read back as a graph first: a model that its architecture's keys cannot describe
is refused, not written as something else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vivace.blocks import (
    AttentionBlock,
    ExpertsBlock,
    LinearBlock,
    MlpBlock,
    ModelGraph,
    NormSpec,
    RopeSpec,
    WeightRef,
    block_norms,
    weight_refs,
)
from vivace.errors import UnsupportedModel, nearest
from vivace.models import graph_from_config
from vivace.models.config import Config
from vivace.models.gguf.architectures import ARCHITECTURES, config_from_metadata
from vivace.models.gguf.names import stored_as_gguf
from vivace.models.rope import inverse_frequencies, rope_parameters

__all__ = ["Storage", "write_gguf"]

_OF_FAMILY = {
    architecture.model_type.replace("-", "_"): name for name, architecture in ARCHITECTURES.items()
} | {"mistral": "llama", "mixtral": "llama"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type


class Storage(StrEnum):
    """How matrices are stored; vectors and routers are float32 always."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


def write_gguf(
    path: Path,
    graph: ModelGraph,
    weights: Mapping[str, np.ndarray],
    config: Config,
    tokenizer: Mapping[str, Any],
    storage: Storage,
) -> None:
    """Write a model; the file appears whole or not at all.

    Args:
        path: of the new file; one that is there is replaced.
        graph: the family's graph, with the names of a checkpoint on the hub.
        weights: its tensors by those names.
        config: its config.
        tokenizer: the keys `tokenizer.*`; empty for a model without one.
        storage: the type of matrices.
    Raises:
        UnsupportedModel: GGUF has no architecture for the family, or none of its keys says what
            this model does.
        OSError: the file cannot be written.
    """
    from gguf import GGUFEndian, GGUFWriter  # imported late: few runs write

    name = _OF_FAMILY.get(graph.family)
    if name is None:
        raise UnsupportedModel(
            f"GGUF has no architecture for the family '{graph.family}': "
            f"{nearest(graph.family, _OF_FAMILY)}"
        )
    stored = stored_as_gguf(graph, ARCHITECTURES[name])
    tensors = _Tensors(graph, stored, weights, ARCHITECTURES[name].rotates_pairs)
    keys = _model_keys(graph, config)
    factors = _rope_factors(graph, keys)
    metadata = {f"{name}.{key}": value for key, value in keys.items()} | dict(tokenizer)
    _check_says_the_same(stored, metadata | {"general.architecture": name}, tensors.shapes, factors)
    partial = path.with_name(path.name + ".partial")
    writer = GGUFWriter(partial, name, endianess=GGUFEndian.LITTLE)
    try:
        writer.add_file_type(_FILE_TYPES[storage])
        for key, value in metadata.items():
            _add(writer, key, value)
        _write_tensors(writer, tensors, factors, storage)
        writer.close()
        os.replace(partial, path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    if isinstance(value, list | tuple | np.ndarray):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_key_value(key, value, GGUFValueType.UINT32)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _write_tensors(
    writer: Any, tensors: _Tensors, factors: Mapping[str, np.ndarray], storage: Storage
) -> None:
    """Tensor by tensor: no more than one is in memory."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {name: _kind(name, shape, storage) for name, shape in tensors.shapes.items()}
    shapes = tensors.shapes | {name: values.shape for name, values in factors.items()}
    for name, shape in shapes.items():
        kind = GGMLQuantizationType[kinds.get(name, Storage.F32).upper()]
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) // block_size * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in kinds.items():
        writer.write_tensor_data(_stored(tensors.array(name), kind))
    for values in factors.values():
        writer.write_tensor_data(values)


def _kind(name: str, shape: Sequence[int], storage: Storage) -> Storage:
    """The type of one tensor; rows that do not divide into blocks keep 16 bits."""
    if len(shape) < 2 or "ffn_gate_inp" in name:
        return Storage.F32
    return Storage.F16 if storage is Storage.Q8_0 and shape[-1] % 32 else storage


def _stored(array: np.ndarray, kind: Storage) -> np.ndarray:
    match kind:
        case Storage.F32:
            return array
        case Storage.F16:
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if not np.isfinite(half).all():
                raise UnsupportedModel("a weight is not finite as f16: store the model as bf16")
            return half
        case Storage.BF16:
            return array.astype(ml_dtypes.bfloat16).view(np.uint16)
        case Storage.Q8_0:
            from gguf import GGMLQuantizationType, quants

            return quants.quantize(array, GGMLQuantizationType.Q8_0)


class _Tensors:
    """The tensors of the new file, each made of the model's on demand.

    `shapes` by name; rows of experts are stacked on a leading axis.
    """

    def __init__(
        self,
        graph: ModelGraph,
        stored: ModelGraph,
        weights: Mapping[str, np.ndarray],
        rotates_pairs: bool,
    ) -> None:
        self._weights = weights
        self._head_dims = dict(_rotated(graph)) if rotates_pairs else {}
        self._plus_one = {norm.weight for norm in _norms(graph) if norm.unit_offset}
        pieces: dict[str, dict[int, WeightRef]] = {}
        for source, target in zip(weight_refs(graph), weight_refs(stored), strict=True):
            pieces.setdefault(target.name, {})[target.first_row] = source
        self._pieces = {
            name: [ref for _, ref in sorted(refs.items())] for name, refs in pieces.items()
        }
        self.shapes = {name: self._shape(name, refs) for name, refs in self._pieces.items()}

    @staticmethod
    def _shape(name: str, refs: list[WeightRef]) -> tuple[int, ...]:
        if "_exps." in name:
            return (len(refs), *refs[0].shape)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            return refs[0].shape[1:]
        return (sum(ref.shape[0] for ref in refs), *refs[0].shape[1:])

    def array(self, name: str) -> np.ndarray:
        """float32 of the shape in `shapes`."""
        pieces = [self._piece(ref) for ref in self._pieces[name]]
        return np.ascontiguousarray(np.concatenate(pieces).reshape(self.shapes[name]))

    def _piece(self, ref: WeightRef) -> np.ndarray:
        stored = self._weights[ref.name]
        stored = stored.T if ref.is_transposed else stored
        rows = np.asarray(stored[ref.first_row : ref.first_row + ref.shape[0]], np.float32)
        if ref in self._plus_one:
            return rows + np.float32(1)
        head_dim = self._head_dims.get(ref)
        if head_dim is None:
            return rows
        halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)


def _rotated(graph: ModelGraph) -> Iterator[tuple[WeightRef, int]]:
    """Queries and keys, weights and biases, with their head size."""
    for block in graph.blocks:
        if isinstance(block, AttentionBlock):
            for ref in (*block.qkv.parts[:2], *block.qkv.biases[:2]):
                if ref is not None:
                    yield ref, block.head_dim


def _norms(graph: ModelGraph) -> Iterator[NormSpec]:
    for block in graph.blocks:
        yield from block_norms(block)
    if graph.head.norm is not None:
        yield graph.head.norm


# ---------------------------------------------------------------- metadata


def _model_keys(graph: ModelGraph, config: Config) -> dict[str, Any]:
    """Keys under the architecture's name, from what the graph does."""
    num_layers = config.integer("num_hidden_layers", graph.num_layers)
    attention = {b.layer: b for b in graph.blocks if isinstance(b, AttentionBlock)}
    first = next(iter(attention.values()))
    sizes = [_sizes(graph, attention, layer) for layer in range(num_layers)]
    eps = next(_norms(graph)).eps
    is_gpt2 = graph.embedding.positions is not None
    keys: dict[str, Any] = {
        "block_count": num_layers,
        "context_length": config.integer("max_position_embeddings", graph.max_positions),
        "embedding_length": graph.hidden_size,
        "vocab_size": graph.vocab_size,
        "attention.head_count": _one([heads for heads, _, _ in sizes]),
        "attention.head_count_kv": _one([heads for _, heads, _ in sizes]),
        "feed_forward_length": _one([size for _, _, size in sizes]),
        f"attention.layer_norm_{'' if is_gpt2 else 'rms_'}epsilon": eps,
    }
    if not is_gpt2:
        keys |= {"attention.key_length": first.head_dim, "attention.value_length": first.head_dim}
        keys |= _rope_keys(graph, config)
    return keys | _window_keys(graph, attention) | _expert_keys(graph) | _scale_keys(graph, first)


def _sizes(
    graph: ModelGraph, attention: Mapping[int, AttentionBlock], layer: int
) -> tuple[int, int, int]:
    """Query heads, key heads and inner size of a layer, as `deci` files have them."""
    inner, has_matrix = 0, False
    for block in graph.blocks:
        if block.layer == layer:
            if isinstance(block, MlpBlock):
                inner = block.down.in_features
            elif isinstance(block, ExpertsBlock):
                inner = block.experts[0].down.in_features
            has_matrix = has_matrix or isinstance(block, LinearBlock)
    own = attention.get(layer)
    if own is not None:
        return own.num_heads, own.num_kv_heads, inner
    return next(iter(attention.values())).num_heads if has_matrix else 0, 0, inner


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _rope_keys(graph: ModelGraph, config: Config) -> dict[str, Any]:
    rope = graph.ropes[0]
    keys: dict[str, Any] = {"rope.dimension_count": rope.rotary_dim, "rope.freq_base": rope.base}
    if len(graph.ropes) > 1:
        keys["rope.freq_base_swa"] = graph.ropes[1].base
    parameters = rope_parameters(config)
    if parameters.text("rope_type", parameters.text("type", None)) == "yarn":
        declared = config.integer("max_position_embeddings")
        original = parameters.integer("original_max_position_embeddings", declared)
        factor = parameters.number("factor", declared / original)
        return keys | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": rope.attention_factor / (0.1 * math.log(factor) + 1.0),
            "rope.scaling.yarn_beta_fast": parameters.number("beta_fast", 32.0),
            "rope.scaling.yarn_beta_slow": parameters.number("beta_slow", 1.0),
        }
    scale = _uniform_factor(rope)
    if scale is not None and scale != 1.0:
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": scale}
    if rope.bands:
        keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": rope.bands[0][0],
            "rope.scaling.attn_factor": rope.attention_factor,
        }
    return keys


def _frequency_factors(rope: RopeSpec, inv_freq: Sequence[float]) -> np.ndarray:
    """What the plain frequencies were divided by: [rotary_dim / 2] float32."""
    assert rope.base is not None
    return inverse_frequencies(rope.base, rope.rotary_dim) / np.asarray(inv_freq, np.float32)


def _uniform_factor(rope: RopeSpec) -> float | None:
    factors = _frequency_factors(rope, rope.inv_freq)
    is_uniform = not rope.bands and np.ptp(factors) <= 1e-5 * factors[0]
    return round(float(factors[0]), 5) if is_uniform else None


def _rope_factors(graph: ModelGraph, keys: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Factors of ropes that keys do not describe, as tensors."""
    if not graph.ropes or keys.get("rope.scaling.type") in ("yarn", "linear"):
        return {}
    rope = graph.ropes[0]
    factors = _frequency_factors(rope, rope.inv_freq)
    if rope.bands:
        long = _frequency_factors(rope, rope.bands[0][1])
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": factors}
    return {} if _uniform_factor(rope) == 1.0 else {"rope_freqs.weight": factors}


def _window_keys(graph: ModelGraph, attention: Mapping[int, AttentionBlock]) -> dict[str, Any]:
    windows = [graph.groups[block.group].window for block in attention.values()]
    widths = {window for window in windows if window is not None}
    if not widths:
        return {}
    pattern = [window is not None for window in windows]
    keys: dict[str, Any] = {"attention.sliding_window": max(widths)}
    return keys if all(pattern) else keys | {"attention.sliding_window_pattern": pattern}


def _expert_keys(graph: ModelGraph) -> dict[str, Any]:
    block = next((b for b in graph.blocks if isinstance(b, ExpertsBlock)), None)
    if block is None:
        return {}
    keys = {
        "expert_count": len(block.experts),
        "expert_used_count": block.num_active,
        "expert_feed_forward_length": block.experts[0].down.in_features,
    }
    if block.shared is not None:
        keys["expert_shared_feed_forward_length"] = block.shared.down.in_features
    return keys


def _scale_keys(graph: ModelGraph, first: AttentionBlock) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if first.soft_cap is not None:
        keys["attn_logit_softcapping"] = first.soft_cap
    if graph.head.soft_cap is not None:
        keys["final_logit_softcapping"] = graph.head.soft_cap
    if graph.family == "minicpm":
        keys["embedding_scale"] = graph.embedding.scale
        keys["residual_scale"] = first.residual_scale
        keys["logit_scale"] = 1 / graph.head.scale
    return keys


def _check_says_the_same(
    stored: ModelGraph,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, np.ndarray],
) -> None:
    """Raises `UnsupportedModel` where a reader would make another graph of the file."""
    name = metadata["general.architecture"]
    config = config_from_metadata(metadata, tensors, factors, "the new file")
    read = stored_as_gguf(graph_from_config(config), ARCHITECTURES[name], tensors)
    for field in ("embedding", "blocks", "head", "groups", "ropes", "next_token_heads"):
        if not _alike(getattr(read, field), getattr(stored, field)):
            raise UnsupportedModel(
                f"GGUF's architecture '{name}' cannot say what this '{stored.family}' model does "
                f"(its {field} would be others): keep it as safetensors"
            )


def _alike(a: Any, b: Any) -> bool:
    """Whether two specs are equal but for the rounding of numbers to float32."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if is_dataclass(a) and type(a) is type(b):
        return all(_alike(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b
