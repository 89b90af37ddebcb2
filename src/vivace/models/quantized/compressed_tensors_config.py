"""What the config of a compressed-tensors checkpoint says of its weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.config import Config

__all__ = ["Group", "read_groups"]

_log = logging.getLogger(__name__)
# Formats, and the type and bits that weights may have in them.
_FORMATS: dict[str, tuple[str, range]] = {
    "pack-quantized": ("int", range(1, 9)),
    "int-quantized": ("int", range(1, 9)),
    "float-quantized": ("float", range(8, 9)),
    "nvfp4-pack-quantized": ("float", range(4, 5)),
    "mxfp4-pack-quantized": ("float", range(4, 5)),
}
_OWN_GROUP_SIZE = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
_STRATEGIES = ("tensor", "channel", "group", "tensor_group")
# Of activation order, only the one that keeps groups in order leaves no trace in the file.
_SCATTERED_ORDERS = ("group", "dynamic")


@dataclass(frozen=True)
class Group:
    """How the weights of a group of modules are stored.

    `group_size` weights share a scale; None: those of a row, or of the matrix (`is_per_tensor`).
    """

    format: str
    bits: int
    is_symmetric: bool
    group_size: int | None
    is_per_tensor: bool


def read_groups(config: Config) -> tuple[Group, ...]:
    """The kinds of weights that there are, once each. Raises `BadFile`, `UnsupportedModel`."""
    for field in ("sparsity_config", "transform_config"):
        other = config.section(field)
        if other is not None and other.values and other.values.get("format") != "dense":
            raise _unsupported(config, f"{field} is not supported")
    config.text("quantization_status", None)  # files that are compressed do not always say so
    if config.section("kv_cache_scheme") is not None:
        _log.warning(
            "%s: kv_cache_scheme is not used: the key/value store is the plan's", config.source
        )
    groups = config.required_section("config_groups")
    if not groups.values:
        raise config.bad("config_groups", "at least one group")
    found = [_group(groups, name, config.text("format")) for name in groups.values]
    return tuple(dict.fromkeys(found))


def _group(groups: Config, name: str, default_format: str) -> Group:
    if isinstance(groups.values[name], list):
        raise _unsupported(groups, f"'{name[:40]}' names a preset")
    group = groups.required_section(name)
    targets = group.values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(item, str) for item in targets):
        raise group.bad("targets", "a list of module names")
    if group.section("output_activations") is not None:
        raise _unsupported(group, "output_activations are not supported")
    inputs = group.section("input_activations")
    if inputs is not None:
        _log.warning(
            "%s: not used: kernels for integer codes round inputs to 8 bits in groups as they "
            "come, all others do not round them",
            inputs.source,
        )
    name_of_format = group.text("format", default_format)
    return _weights(group.required_section("weights"), name_of_format)


def _weights(weights: Config, format: str) -> Group:
    kind, bits = weights.text("type", "int"), weights.integer("num_bits", 8, high=16)
    if format == "naive-quantized":
        format = f"{kind}-quantized"
    if format not in _FORMATS:
        raise _unsupported(weights, f"format '{format[:40]}' is not supported")
    wanted, widths = _FORMATS[format]
    if kind != wanted:
        raise weights.bad("type", f"'{wanted}' in the format {format}")
    if bits not in widths:
        raise weights.bad("num_bits", f"{widths[0]} to {widths[-1]} in the format {format}")
    if weights.values.get("dynamic", False) is not False:
        raise weights.bad("dynamic", "false, for weights")
    _check_order(weights)
    size = weights.integer("group_size", None, low=-1)
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.text("strategy", default)
    if strategy not in _STRATEGIES:
        raise _unsupported(weights, f"strategy '{strategy[:40]}' is not supported")
    is_grouped = strategy in ("group", "tensor_group")
    if is_grouped and (size is None or size < 1):
        raise weights.bad("group_size", f"a whole number from 1, as the strategy is {strategy}")
    is_symmetric = weights.boolean("symmetric", True)
    if format in _OWN_GROUP_SIZE and (size != _OWN_GROUP_SIZE[format] or not is_grouped):
        raise weights.bad("group_size", f"{_OWN_GROUP_SIZE[format]} in the format {format}")
    if kind == "float" and not is_symmetric:
        raise weights.bad("symmetric", f"true in the format {format}")
    return Group(format, bits, is_symmetric, size if is_grouped else None, strategy == "tensor")


def _check_order(weights: Config) -> None:
    order: Any = weights.values.get("actorder")
    if order is True or order in _SCATTERED_ORDERS:
        raise _unsupported(weights, "actorder 'group' is not supported: groups are scattered")
    if order not in (None, False, "weight", "static"):
        raise weights.bad("actorder", "null, 'weight' or 'static'")


def _unsupported(config: Config, reason: str) -> UnsupportedModel | BadFile:
    known = ", ".join(_FORMATS)
    return UnsupportedModel(
        f"{config.source}: {reason}; use the unquantized checkpoint, or one in a format of {known}"
    )
