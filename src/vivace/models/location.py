"""Where a model lies: a shipped name, a directory, a GGUF file, or a name on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vivace.errors import ModelNotFound, UnsupportedModel, nearest
from vivace.models.gguf.files import gguf_models
from vivace.models.hub import cached_models, find, is_hub_name, split_hub_name

__all__ = ["DEFAULT_MODEL", "LocalModel", "list_local", "resolve", "shipped"]

DEFAULT_MODEL = "tiny"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine; `origin` is `shipped` or `hub`."""

    name: str
    path: Path
    num_bytes: int
    origin: str


def resolve(location: str | Path) -> Path:
    """The directory or GGUF file of a model, downloaded first where it is a hub name not here yet.

    A hub name is `org/name` or `org/name@revision`; `:Q4_K_M` or `:FILE.gguf` after it picks one
    of the GGUF models of a repository. A directory that holds nothing but one GGUF model stands
    for its file. Of a split it is the first part, or the part that was given.

    Raises `ModelNotFound` or `UnsupportedModel`.
    """
    text = os.fspath(location)
    if not text or "\0" in text:
        raise ModelNotFound(f"model {text!r} is no name: expected a directory, org/name or tiny")
    if isinstance(location, str) and text in shipped():
        return shipped()[text]  # ./tiny is a directory of that name
    path = Path(text).expanduser()
    if _exists(path):
        return _in_directory(path) if path.is_dir() else _single_file(path)
    if isinstance(location, str) and is_hub_name(text):
        return find(*split_hub_name(text))
    if path.suffix or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ModelNotFound(
            f"model '{text}' is not here: expected a directory, a .gguf file, org/name on the hub, "
            f"or a shipped name ({nearest(text, shipped())})"
        )
    raise ModelNotFound(f"model '{text}' is not a hub name: expected org/name[@revision][:QUANT]")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def _in_directory(path: Path) -> Path:
    """The directory, or the GGUF model in it where it is not one of safetensors."""
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return path
    models = gguf_models(item.name for item in path.iterdir() if item.is_file())
    if len(models) > 1:
        files = ", ".join(model.files[0] for model in models)
        raise ModelNotFound(f"{path}: has {len(models)} GGUF models: name one of {files}")
    return path / models[0].files[0] if models else path


def _single_file(path: Path) -> Path:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return path
    if suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}:
        raise UnsupportedModel(
            f"{path}: is a pickle, which can run code when read: convert it to safetensors"
        )
    if path.name in {"config.json", "model.safetensors", "model.safetensors.index.json"}:
        raise UnsupportedModel(f"{path}: is one file of a model: give its directory, {path.parent}")
    raise UnsupportedModel(
        f"{path}: is not a model: expected a .gguf file, or a directory with config.json and "
        "safetensors files"
    )


def shipped() -> dict[str, Path]:
    """Models that come with Vivace, by name."""
    assets = Path(__file__).parents[1] / "assets"
    if not assets.is_dir():
        return {}
    return {item.name: item for item in sorted(assets.iterdir()) if (item / "config.json").exists()}


def list_local() -> list[LocalModel]:
    """Models on this machine: the shipped ones, then those in the hub's cache that could be run."""
    found = [
        LocalModel(name, path, _num_bytes(path), "shipped") for name, path in shipped().items()
    ]
    return found + [LocalModel(*model, "hub") for model in cached_models()]


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
