"""`vivace doctor`: what this machine has, and what vivace makes of it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click

from vivace.cli.options import command
from vivace.cli.output import format_bytes, print_json, print_table
from vivace.config import Settings, config_files

__all__ = ["doctor"]


def _doctor(settings: Settings, model: str | None) -> None:
    """Print what matters for speed and for a report of a problem.

    With MODEL, all of its weights are searched for NaN and infinity, too.
    """
    facts = {**_software(), **_native(settings), **_processors(), **_memory(), **_folders()}
    if settings["measure"]:
        facts |= _measured()
    if model is not None:
        facts |= _checked(model)
    if settings["json"]:
        print_json(facts)
        return
    print_table(
        ("what", "value"),
        [
            (name.removesuffix("_bytes").replace("_", " "), _spell(name, value))
            for name, value in facts.items()
        ],
    )


def _software() -> dict[str, Any]:
    from importlib import metadata

    from vivace import __version__

    # Looked up, not imported: importing torch takes a second and 200 MB.
    has_torch = importlib.util.find_spec("torch") is not None
    return {
        "vivace": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "torch": metadata.version("torch") if has_torch else None,
    }


def _native(settings: Settings) -> dict[str, Any]:
    try:
        from vivace import _native as core
    except ImportError as error:
        return {"native": f"not built ({error}): pip install -e ."}
    names = core.isa_names()
    return {
        "native": core.__file__,
        "instruction_sets": names,
        "instruction_set": settings["isa"] or names[-1],
        "threads": core.default_threads(),
    }


def _measured() -> dict[str, Any]:
    """Bandwidth and peaks of this minute: a shared machine's move within the hour."""
    from vivace import _native as core

    return {
        "read_bytes_per_second": core.read_bandwidth(),
        "float32_operations_per_second": core.peak_flops("float32"),
        "bfloat16_operations_per_second": core.peak_flops("bfloat16"),
    }


def _checked(model: str) -> dict[str, Any]:
    from vivace.models.loading import load_model

    loaded = load_model(model)
    loaded.check_all_weights()
    return {"model": str(loaded.path), "weights": "all finite"}


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system, or a container that hides it
        return []


# ---------------------------------------------------------------- threads and memory


def _processors() -> dict[str, Any]:
    facts: dict[str, Any] = {"processors": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        facts["processors_allowed"] = len(os.sched_getaffinity(0))
    facts["processors_quota"] = _quota()
    return facts


def _quota() -> float | None:
    """Processors that the control group may use per second; None: no limit."""
    words = next(iter(_lines("/sys/fs/cgroup/cpu.max")), "").split()  # version 2
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota = _lines("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")  # version 1
    period = _lines("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def _memory() -> dict[str, Any]:
    kilobytes = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in _lines("/proc/meminfo"))
        if rest.split() and rest.split()[0].isdigit()
    }
    limit = next(iter(_lines("/sys/fs/cgroup/memory.max")), "max")
    facts = {}
    if "MemTotal" in kilobytes:
        facts["memory_bytes"] = kilobytes["MemTotal"] * 1024
        facts["memory_free_bytes"] = kilobytes.get("MemAvailable", 0) * 1024
    facts["memory_limit_bytes"] = int(limit) if limit.isdigit() else None
    return facts


# ---------------------------------------------------------------- folders


def _folders() -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return {
        "hub_cache": HF_HUB_CACHE,
        "config_files": [str(path) for path in config_files()],
        "executable": sys.executable,
    }


def _spell(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_per_second"):
        return f"{value / 1e9:.1f} billion"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


doctor = command(
    "doctor", _doctor, "measure", "json", parameters=(click.Argument(["model"], required=False),)
)
