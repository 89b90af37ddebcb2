"""Models on the Hugging Face hub and in its cache: safetensors repositories and GGUF files."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vivace.errors import BadFile, ModelNotFound, UserError
from vivace.models.formats.strict_json import read_object
from vivace.models.gguf.files import GgufModel, gguf_models, select, selector

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo

__all__ = ["cached_models", "find", "is_hub_name", "pull", "split_hub_name"]

_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?")
# What is fetched of a safetensors repository; in particular no pickles and no code.
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "additional_chat_templates/*")


def is_hub_name(text: str) -> bool:
    """Whether a text has the form `org/name`, `org/name@revision` or either with `:QUANT`."""
    return _HUB_NAME.fullmatch(text) is not None


def split_hub_name(text: str) -> tuple[str, str | None, str | None]:
    """The name, revision, and quantization or GGUF file of a hub name. Raises `ModelNotFound`."""
    parts = _HUB_NAME.fullmatch(text)
    if parts is None:
        raise ModelNotFound(f"'{text}' is not a hub name: expected org/name[@revision][:QUANT]")
    return parts[1], parts[2], parts[3]


def find(name: str, revision: str | None = None, quantization: str | None = None) -> Path:
    """A model from the cache if it is whole there, without the network, else from the hub.

    See `pull` for what is returned and raised.
    """
    with _explained(name, quantization):
        path = _cached(name, revision, quantization)
    return pull(name, revision, quantization) if path is None else path


def pull(name: str, revision: str | None = None, quantization: str | None = None) -> Path:
    """Download a model, or what has changed of it, into the hub's own cache.

    `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` have their usual meaning.

    Args:
        quantization: of the GGUF model to fetch, such as `Q4_K_M`, or the name of its file. With
            none, GGUF is fetched only where the repository has no safetensors: `Q4_K_M`, or else
            the only one there is.
    Returns:
        The directory of a safetensors model, or the GGUF file, the first part of a split.
    Raises:
        ModelNotFound: with what to do.
        UserError: the files cannot be written.
    """
    from huggingface_hub import HfApi, snapshot_download

    if not is_hub_name(name):
        raise ModelNotFound(f"'{name}' is not a hub name: expected org/name")
    with _explained(name, quantization):
        try:
            files = HfApi().model_info(name, revision=revision).siblings or []
        except (OSError, _transport_error()):
            # Like the hub's library: where the hub cannot be reached, what the cache has will do.
            path = _cached(name, revision, quantization)
            if path is None and quantization is None:
                path = _safetensors_snapshot(name, revision)
            if path is None:
                raise
            return path
        picked = _pick(name, [file.rfilename for file in files], quantization)
        patterns = _PATTERNS if picked is None else [glob.escape(file) for file in picked.files]
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    return path if picked is None else path / picked.files[0]


def cached_models() -> Iterator[tuple[str, Path, int]]:
    """Name, path and bytes of each model in the cache that could be run without a download."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda item: item.repo_id):
        for revision in repo.revisions:
            if repo.repo_type == "model" and "main" in revision.refs:
                yield from _models_of(repo.repo_id, revision)


# ---------------------------------------------------------------- cache


def _cached(name: str, revision: str | None, quantization: str | None) -> Path | None:
    """What `pull` would return, if the cache has all of it."""
    if quantization is None:
        path = _safetensors_snapshot(name, revision)
        with suppress(BadFile):  # a damaged index: what is there is fetched again
            if path is not None and _is_whole(path):
                return path
    path = _snapshot(name, revision, ())
    if path is None or (quantization is None and _has_safetensors(path)):
        return None
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    picked = select(gguf_models(files), quantization)
    is_here = len(picked) == 1 and picked[0].is_whole
    return path / picked[0].files[0] if is_here else None


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """The snapshot in the cache; None if there is none, or one known to lack files that match."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None


def _safetensors_snapshot(name: str, revision: str | None) -> Path | None:
    path = _snapshot(name, revision, _PATTERNS)
    return path if path is not None and _has_safetensors(path) else None


def _has_safetensors(path: Path) -> bool:
    return any(path.glob("*.safetensors"))


def _is_whole(path: Path) -> bool:
    """Whether a snapshot has its config, its tokenizer and every file of safetensors weights."""
    if not all((path / name).exists() for name in ("config.json", "tokenizer.json")):
        return False
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        return _has_safetensors(path)
    weight_map = read_object(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return all(isinstance(item, str) and (path / item).exists() for item in names)


def _models_of(name: str, revision: CachedRevisionInfo) -> Iterator[tuple[str, Path, int]]:
    path = revision.snapshot_path
    num_bytes = {
        file.file_path.relative_to(path).as_posix(): file.size_on_disk for file in revision.files
    }
    try:
        is_whole = _is_whole(path)
    except BadFile:
        is_whole = False
    if is_whole:
        yield name, path, sum(n for file, n in num_bytes.items() if not file.endswith(".gguf"))
    models = gguf_models(num_bytes)
    for model in models:
        if model.is_whole:
            size = sum(num_bytes[file] for file in model.files)
            yield f"{name}:{selector(model, models)}", path / model.files[0], size


# ---------------------------------------------------------------- hub


def _pick(name: str, files: list[str], quantization: str | None) -> GgufModel | None:
    """The GGUF model to fetch of a repository with these files; None: all of its safetensors."""
    models = gguf_models(files)
    if quantization is None and (not models or any(f.endswith(".safetensors") for f in files)):
        return None
    picked = select(models, quantization)
    if len(picked) == 1 and picked[0].is_whole:
        return picked[0]
    if len(picked) == 1:
        raise ModelNotFound(
            f"model '{name}' has only {len(picked[0].files)} of the {picked[0].num_parts} parts "
            f"of {picked[0].name} on the hub: choose another quantization or repository"
        )
    known = ", ".join(selector(model, models) for model in picked or models) or "none"
    if not picked:
        raise ModelNotFound(f"model '{name}' has no GGUF model '{quantization}': there are {known}")
    raise ModelNotFound(
        f"model '{name}' has {len(picked)} GGUF models that fit: "
        f"say {name}:QUANT with one of {known}"
    )


@contextmanager
def _explained(name: str, quantization: str | None) -> Iterator[None]:
    """The hub's refusals as errors of ours."""
    from huggingface_hub import errors

    wanted = name if quantization is None else f"{name}:{quantization}"
    unreachable = (
        f"model '{wanted}' is not in the cache and the hub cannot be reached: "
        "check the network, unset HF_HUB_OFFLINE, or give a directory or a file"
    )
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"model '{name}' is gated: accept its licence on the hub and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelNotFound(
            f"model '{name}' is not on the hub: check the name; private ones need HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelNotFound(unreachable) from error
    except errors.HfHubHTTPError as error:
        raise ModelNotFound(f"model '{name}': hub error ({_line(error)}): try again") from error
    except _transport_error() as error:
        raise ModelNotFound(unreachable) from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"'{name}' is not a hub name: expected org/name") from error
    except OSError as error:
        raise UserError(f"model '{name}' cannot be downloaded: {_line(error)}") from error


def _transport_error() -> type[Exception]:
    """The base of errors such as a lost connection, which the hub's library does not wrap.

    Which transport it is depends on the library's version.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
