"""Models as commands name them, and how settings become an `LLM`."""

from __future__ import annotations

import dataclasses
import difflib
import os
import shlex
from typing import TYPE_CHECKING, Any

from vivace.cli.output import format_bytes, print_json, print_table
from vivace.config import SAMPLING, Settings
from vivace.errors import ModelNotFound

if TYPE_CHECKING:
    from vivace.llm import LLM
    from vivace.types import SamplingParams

__all__ = [
    "check_no_typo",
    "check_sampling",
    "load",
    "names_model",
    "print_estimate",
    "sampling_params",
]


def names_model(text: str) -> bool:
    """Whether an argument that could be a model or a prompt is a model."""
    from vivace.models.hub import is_hub_name
    from vivace.models.location import shipped

    if os.path.isdir(text) or (text.lower().endswith(".gguf") and os.path.isfile(text)):
        return True
    return len(text.split()) == 1 and (
        text.startswith(("/", "./", "../", "~/"))
        or text.endswith((".gguf", ".safetensors"))
        or text in shipped()
        or is_hub_name(text)
    )


def check_no_typo(prompt: str) -> None:
    """Refuse a prompt that looks like a mistyped shipped name. Raises `ModelNotFound`."""
    from vivace.models.location import shipped

    close = difflib.get_close_matches(prompt.strip().lower(), shipped(), cutoff=0.75)
    if close:
        raise ModelNotFound(
            f"no model '{prompt}': did you mean {' or '.join(close)}? As a prompt it needs the "
            f"model before it: vivace run {close[0]} {shlex.quote(prompt)}"
        )


def load(model: str, settings: Settings, plan: str | None = None) -> LLM:
    """The model under the settings; `plan` replaces the plan and what it may choose."""
    from vivace.llm import LLM

    names = ("threads", "isa", "tokenization", "weight_cache")
    return LLM(model, **{name: settings[name] for name in names}, **_options(settings, plan))


def _options(settings: Settings, plan: str | None = None) -> dict[str, Any]:
    options = {"plan": plan or settings["plan"], "max_context": settings["context"]}
    for name in ("weights", "kv") if plan is None else ():
        # What the plan itself says comes with its options: only other origins override it.
        if not settings.origin(name).startswith("plan "):
            options[name] = settings[name]
    return options


def sampling_params(llm: LLM, chosen: dict[str, Any]) -> SamplingParams:
    """What was chosen, over what the checkpoint recommends."""
    return dataclasses.replace(llm.default_params(), **chosen)


def check_sampling(settings: Settings) -> None:
    """Refuse wrong sampling settings before a model is loaded. Raises `InvalidRequest`."""
    from vivace.types import SamplingParams

    SamplingParams(**settings.given(SAMPLING))


def print_estimate(model: str, settings: Settings) -> None:
    from vivace.llm import LLM

    needed = LLM.estimate(model, **_options(settings))
    if settings["json"]:
        print_json({"model": model, "total_bytes": needed.total_bytes} | dataclasses.asdict(needed))
        return
    rows = [
        ("weights", format_bytes(needed.weight_bytes)),
        ("cache", f"{format_bytes(needed.cache_bytes)} for a context of {needed.max_context}"),
        ("working space", format_bytes(needed.working_bytes)),
        ("total", format_bytes(needed.total_bytes)),
    ]
    print_table(("memory", "needed"), rows)
