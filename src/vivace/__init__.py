"""Vivace: an inference engine for open-weight language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.llm import LLM, Completion, Delta
    from vivace.plan import Plan
    from vivace.types import SamplingParams

__all__ = ["LLM", "Completion", "Delta", "Plan", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "vivace.llm",
    "Completion": "vivace.llm",
    "Delta": "vivace.llm",
    "Plan": "vivace.plan",
    "SamplingParams": "vivace.types",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: `vivace --help` must not load numpy."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("vivace")
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vivace' has no attribute '{name}'")
