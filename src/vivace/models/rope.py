"""Rotary embedding as data: frequencies from a config, cosines and sines from frequencies.

Frequencies that depend on the length are taken by position here: row p is rotated as the last row
of a sequence of p + 1 tokens, because what a row reads may depend on its own position only.
Token-by-token decoding elsewhere gives the same; a long prefill in one piece may not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vivace.blocks import RopeSpec
from vivace.errors import BadFile, UnsupportedModel, nearest
from vivace.models.config import Config

__all__ = [
    "MAX_POSITIONS",
    "inverse_frequencies",
    "max_positions",
    "rope_parameters",
    "rope_spec",
    "rope_table",
]

MAX_POSITIONS = 2**24  # whole numbers up to here are exact in float32, as angles need
_DEFAULT_BASE = 10_000.0
_LARGEST_BASE = 1e15
_LARGEST_FACTOR = 1e6
_ROWS_AT_ONCE = 4096


def rope_table(spec: RopeSpec, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of positions [0, num_positions): two [num_positions, rotary_dim/2] float32.

    The angle is the float32 product of position and frequency; its cosine is taken in float64,
    rounded, and multiplied by the attention factor.
    """
    cos = np.empty((num_positions, len(spec.inv_freq)), np.float32)
    sin = np.empty_like(cos)
    starts = [(0, spec.inv_freq, spec.attention_factor), *spec.bands]
    ends = [start for start, *_ in starts[1:]] + [num_positions]
    for (start, inv_freq, factor), end in zip(starts, ends, strict=True):
        for first in range(start, min(end, num_positions), _ROWS_AT_ONCE):
            rows = slice(first, min(first + _ROWS_AT_ONCE, end, num_positions))
            positions = np.arange(rows.start, rows.stop)
            frequencies = np.asarray(inv_freq, np.float32)[None, :]
            if spec.dynamic is not None:
                frequencies = _dynamic_frequencies(spec.dynamic, positions, frequencies)
            angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
            cos[rows] = np.cos(angles).astype(np.float32) * np.float32(factor)
            sin[rows] = np.sin(angles).astype(np.float32) * np.float32(factor)
    return cos, sin


def _dynamic_frequencies(
    dynamic: tuple[float, float, int], positions: np.ndarray, inv_freq: np.ndarray
) -> np.ndarray:
    """Frequencies per position: [num_positions, rotary_dim/2] float32; see `rope_spec`."""
    base, factor, original = dynamic
    dim = 2 * inv_freq.shape[1]
    lengths = np.maximum(positions + 1, original)
    growth = factor * lengths / original - (factor - 1)
    bases = base * growth ** (dim / (dim - 2))
    grown = inverse_frequencies(bases[:, None], dim)
    return np.where(lengths[:, None] > original, grown, inv_freq)


def inverse_frequencies(base: float | np.ndarray, dim: int) -> np.ndarray:
    """base ** (-2j / dim) with float32 exponents and results: [..., dim/2] float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(base), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / powers


# ---------------------------------------------------------------- from a config


def rope_spec(
    config: Config,
    head_dim: int,
    base: float = _DEFAULT_BASE,
    *,
    base_field: str = "rope_theta",
    parameters: Config | None = None,
) -> RopeSpec:
    """The rotary embedding that a config asks for, in the old or the new spelling.

    New: `rope_parameters` holds everything. Old: `rope_theta` beside `rope_scaling`, whose kind is
    called `rope_type` or `type`. Kinds and formulas are those of transformers' rope parameters.

    Args:
        head_dim: of which a share, by default all, is rotated.
        base: where the config does not say.
        base_field: the name of the base in the old spelling.
        parameters: the object that holds the rope's fields; None: the one of the whole model.
    Raises:
        UnsupportedModel: a kind that is not known.
        BadFile: a wrong value.
    """
    parameters = rope_parameters(config) if parameters is None else parameters
    kind = _kind(parameters)
    outer_base = config.number(base_field, base, high=_LARGEST_BASE)
    base = parameters.number("rope_theta", outer_base, high=_LARGEST_BASE)
    outer_share = config.number("partial_rotary_factor", 1.0, high=1.0)
    share = parameters.number("partial_rotary_factor", outer_share, high=1.0)
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise config.bad("head_dim", f"an even rotary size, not {dim} of {head_dim} per head")
    with np.errstate(over="ignore", divide="ignore"):
        spec = _KINDS[kind](config, parameters, base, dim)
    if not np.isfinite(spec.inv_freq).all():
        raise BadFile(f"{config.source}: the rope base {base:g} gives frequencies beyond float32")
    return replace(spec, base=base)


def max_positions(config: Config) -> int:
    """The context in tokens: what the config declares, stretched by scalings that say by how much.

    `linear` and `dynamic` configs keep the original context in `max_position_embeddings`, and so do
    some with `yarn`.
    """
    declared = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    parameters = rope_parameters(config)
    if _kind(parameters) not in ("linear", "dynamic", "yarn"):
        return declared
    original = _original_context(config, parameters)
    stretched = int(original * parameters.number("factor", 1.0, high=_LARGEST_FACTOR))
    return min(max(declared, stretched), MAX_POSITIONS)


def rope_parameters(config: Config) -> Config:
    """The object that holds the rope's fields; the older spelling wins where both are given."""
    for name in ("rope_scaling", "rope_parameters"):
        parameters = config.section(name)
        if parameters is not None and parameters.values:
            return parameters
    return Config({}, f"{config.source}: rope_parameters")


def _kind(parameters: Config) -> str:
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    nested = [name for name, value in parameters.values.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModel(
            f"{parameters.source}: '{nested[0]}' holds its own rope parameters, which this family "
            "does not support: expected one set for all layers"
        )
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"{parameters.source}: rope type '{kind}' is not supported: {nearest(kind, _KINDS)}"
        )
    return kind


def _original_context(config: Config, parameters: Config) -> int:
    """The context of pretraining; a field beside the rope's own takes precedence."""
    declared = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    name = "original_max_position_embeddings"
    inner = parameters.integer(name, declared, high=MAX_POSITIONS)
    return config.integer(name, inner, high=MAX_POSITIONS)


def _spec(inv_freq: np.ndarray, attention_factor: float = 1.0) -> RopeSpec:
    return RopeSpec(tuple(inv_freq.astype(np.float32).tolist()), attention_factor)


def _default(config: Config, parameters: Config, base: float, dim: int) -> RopeSpec:
    return _spec(inverse_frequencies(base, dim))


def _linear(config: Config, parameters: Config, base: float, dim: int) -> RopeSpec:
    """Positions divided by a factor. Source: Chen et al. 2023, arXiv 2306.15595."""
    factor = np.float32(parameters.number("factor", high=_LARGEST_FACTOR))
    return _spec(inverse_frequencies(base, dim) / factor)


def _dynamic(config: Config, parameters: Config, base: float, dim: int) -> RopeSpec:
    """A base that grows with the length past the original context (dynamic NTK)."""
    if dim <= 2:
        raise config.bad("head_dim", "a rotary size above 2 for dynamic rope")
    factor = parameters.number("factor", high=_LARGEST_FACTOR)
    if factor < 1:
        raise parameters.bad("factor", "a number of at least 1")
    original = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    inv_freq = tuple(inverse_frequencies(base, dim).tolist())
    return RopeSpec(inv_freq, dynamic=(base, factor, original))


def _yarn(config: Config, parameters: Config, base: float, dim: int) -> RopeSpec:
    """Interpolation by wavelength. Source: Peng et al. 2023, arXiv 2309.00071."""
    original = _original_context(config, parameters)
    declared = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    factor = parameters.number("factor", declared / original, high=_LARGEST_FACTOR)
    if base == 1.0:
        raise config.bad("rope_theta", "a number other than 1 for yarn")
    fast = parameters.number("beta_fast", 32.0)
    slow = parameters.number("beta_slow", 1.0)

    def dimension(num_rotations: float) -> float:
        """The pair that turns `num_rotations` times over the original context."""
        turns = original / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(base))

    low, high = dimension(fast), dimension(slow)
    if parameters.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)  # share of the frequency that is not interpolated
    inv_freq = inverse_frequencies(base, dim)
    mixed = inv_freq / np.float32(factor) * (1 - kept) + inv_freq * kept
    return _spec(mixed, _yarn_attention_factor(parameters, factor))


def _yarn_attention_factor(parameters: Config, factor: float) -> float:
    if parameters.has("attention_factor"):
        return parameters.number("attention_factor")

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale = parameters.number("mscale", None)
    scale_all = parameters.number("mscale_all_dim", None)
    if scale and scale_all:
        return temperature(scale) / temperature(scale_all)
    return temperature(1.0)


def _longrope(config: Config, parameters: Config, base: float, dim: int) -> RopeSpec:
    """A factor per frequency, in two sets. Source: Ding et al. 2024, arXiv 2402.13753."""
    original = _original_context(config, parameters)
    declared = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    factor = parameters.number("factor", declared / original, high=_LARGEST_FACTOR)
    if parameters.has("attention_factor"):
        attention_factor = parameters.number("attention_factor")
    elif factor <= 1:
        attention_factor = 1.0
    elif original == 1:
        raise parameters.bad("original_max_position_embeddings", "more than 1 token for longrope")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    plain = inverse_frequencies(base, dim)
    short, long = (
        plain / np.asarray(parameters.numbers(name, dim // 2), np.float32)
        for name in ("short_factor", "long_factor")
    )
    short_scale = parameters.number("short_mscale", attention_factor)
    long_scale = parameters.number("long_mscale", attention_factor)
    if np.array_equal(short, long) and short_scale == long_scale:
        return _spec(short, short_scale)
    bands = ((original, tuple(long.tolist()), long_scale),)
    return RopeSpec(tuple(short.tolist()), short_scale, bands=bands)


def _llama3(config: Config, parameters: Config, base: float, dim: int) -> RopeSpec:
    """Long wavelengths divided, short ones kept, a ramp between. Source: arXiv 2407.21783, 3.4."""
    original = _original_context(config, parameters)
    factor = np.float32(parameters.number("factor", high=_LARGEST_FACTOR))
    low = parameters.number("low_freq_factor")
    high = parameters.number("high_freq_factor")
    if high <= low:
        raise parameters.bad("high_freq_factor", f"more than low_freq_factor, which is {low:g}")
    inv_freq = inverse_frequencies(base, dim)
    turns = np.float32(original) / (np.float32(2 * math.pi) / inv_freq)  # over the old context
    smooth = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return _spec((1 - smooth) * inv_freq / factor + smooth * inv_freq)


_KINDS: dict[str, Callable[[Config, Config, float, int], RopeSpec]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its first name
    "llama3": _llama3,
}
