"""Which layers read only a window of the past, in the ways in which configs say it."""

from __future__ import annotations

from collections.abc import Callable

from vivace.models.config import Config
from vivace.models.families._decoder import MAX_LAYERS
from vivace.models.rope import MAX_POSITIONS

__all__ = ["layer_windows", "optional_window", "sliding_window", "upper_windows"]


def sliding_window(config: Config, default: int | None = None) -> int | None:
    """The window in tokens, `default` where the config does not say; null means none."""
    if config.is_null("sliding_window"):
        return None
    return config.integer("sliding_window", default, high=MAX_POSITIONS)


def layer_windows(
    config: Config, window: int | None, is_windowed: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Each layer's window: where `layer_types` says so, or without it where `is_windowed(layer)`.

    Raises `BadFile` for a kind that is not known, or a windowed layer without a window.
    """
    num_layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    kinds = config.values.get("layer_types")
    if kinds is None:
        return tuple(window if is_windowed(layer) else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    is_list = isinstance(kinds, list) and len(kinds) == num_layers
    if not is_list or any(kind not in known for kind in kinds):
        raise config.bad("layer_types", f"{num_layers} strings, each {known[0]} or {known[1]}")
    if window is None and known[1] in kinds:
        raise config.bad("layer_types", f"no {known[1]} where there is no sliding_window")
    return tuple(window if kind == known[1] else None for kind in kinds)


def optional_window(config: Config) -> int | None:
    """The window where `use_sliding_window` asks for one."""
    if not config.boolean("use_sliding_window"):
        return None
    return config.integer("sliding_window", 4096, high=MAX_POSITIONS)


def upper_windows(config: Config) -> tuple[int | None, ...]:
    """Each layer's window as Qwen says it: from `max_window_layers` up, where it is asked for."""
    first_windowed = config.integer("max_window_layers", 28, low=0)
    return layer_windows(config, optional_window(config), lambda layer: layer >= first_windowed)
