"""Where a model lies: a shipped name, a directory, or a name on the hub and its cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vivace.errors import ModelNotFound, UnsupportedModel, UserError, nearest
from vivace.models.formats.strict_json import read_object

__all__ = ["DEFAULT_MODEL", "LocalModel", "list_local", "pull", "resolve", "shipped"]

DEFAULT_MODEL = "tiny"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# What is fetched from a hub repository; in particular no pickles and no code.
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "additional_chat_templates/*")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine; `origin` is `shipped` or `hub`."""

    name: str
    path: Path
    num_bytes: int
    origin: str


def resolve(location: str | Path) -> Path:
    """The directory of a model, downloaded first where it is a hub name that is not here yet.

    A hub name is `org/name` or `org/name@revision`.

    Raises `ModelNotFound` or `UnsupportedModel`.
    """
    text = os.fspath(location)
    if not text or "\0" in text:
        raise ModelNotFound(f"model {text!r} is no name: expected a directory, org/name or tiny")
    if isinstance(location, str) and text in shipped():
        return shipped()[text]  # ./tiny is a directory of that name
    path = Path(text).expanduser()
    if _exists(path):
        return _directory(path)
    name, _, rest = text.partition(":")
    if isinstance(location, str) and _HUB_NAME.fullmatch(name):
        if rest:
            raise UnsupportedModel(
                f"model '{text}': GGUF files are not supported yet: use a safetensors model"
            )
        name, _, revision = text.partition("@")
        return _from_hub(name, revision or None)
    if path.suffix or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ModelNotFound(
            f"model '{text}' is not here: expected a directory, org/name on the hub, or a shipped "
            f"name ({nearest(text, shipped())})"
        )
    raise ModelNotFound(f"model '{text}' is not a hub name: expected org/name")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def _directory(path: Path) -> Path:
    if path.is_dir():
        return path
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
        f"{path}: is not a model: expected a directory with config.json and safetensors files"
    )


def shipped() -> dict[str, Path]:
    """Models that come with Vivace, by name."""
    assets = Path(__file__).parents[1] / "assets"
    if not assets.is_dir():
        return {}
    return {item.name: item for item in sorted(assets.iterdir()) if (item / "config.json").exists()}


# ---------------------------------------------------------------- hub


def _from_hub(name: str, revision: str | None = None) -> Path:
    """A snapshot from the cache if it is whole, else from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_PATTERNS), local_files_only=True
            )
        )
        if _is_whole(path):
            return path
    except LocalEntryNotFoundError:
        pass
    return pull(name, revision)


def _is_whole(path: Path) -> bool:
    """Whether a snapshot has its config, its tokenizer and every file of weights."""
    if not all((path / name).exists() for name in ("config.json", "tokenizer.json")):
        return False
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        return any(path.glob("*.safetensors"))
    weight_map = read_object(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return all(isinstance(item, str) and (path / item).exists() for item in names)


def pull(name: str, revision: str | None = None) -> Path:
    """Download a model, or what has changed of it, into the hub's own cache.

    `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` have their usual meaning.

    Raises `ModelNotFound` with what to do.
    """
    from huggingface_hub import errors, snapshot_download

    if not _HUB_NAME.fullmatch(name):
        raise ModelNotFound(f"'{name}' is not a hub name: expected org/name")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"model '{name}' is gated: accept its licence on the hub and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelNotFound(
            f"model '{name}' is not on the hub: check the name; private ones need HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"model '{name}' is not in the cache and the hub cannot be reached: "
            "check the network, unset HF_HUB_OFFLINE, or give a directory"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelNotFound(f"model '{name}': hub error ({_line(error)}): try again") from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"'{name}' is not a hub name: expected org/name") from error
    except OSError as error:
        raise UserError(f"model '{name}' cannot be downloaded: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def list_local() -> list[LocalModel]:
    """Models on this machine: the shipped ones, then those in the hub's cache that could be run."""
    found = [
        LocalModel(name, path, _num_bytes(path), "shipped") for name, path in shipped().items()
    ]
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return found
    for repo in sorted(repos, key=lambda item: item.repo_id):
        for revision in repo.revisions:
            names = {file.file_name for file in revision.files}
            has_weights = any(name.endswith(".safetensors") for name in names)
            if "main" in revision.refs and "config.json" in names and has_weights:
                found.append(
                    LocalModel(repo.repo_id, revision.snapshot_path, revision.size_on_disk, "hub")
                )
    return found


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
