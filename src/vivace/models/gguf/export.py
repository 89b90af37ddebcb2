"""Any model as one GGUF file: of a checkpoint it is written anew, of a GGUF file it is a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vivace.errors import InvalidOption, UnsupportedModel
from vivace.models.formats.gguf import GgufFile
from vivace.models.gguf.checkpoint import sampling_keys
from vivace.models.gguf.files import gguf_models
from vivace.models.gguf.tokenizer import tokenizer_from_metadata
from vivace.models.gguf.tokenizer_keys import tokenizer_keys
from vivace.models.gguf.write import Storage, copy_gguf, write_gguf
from vivace.models.loading import LoadedModel
from vivace.models.packing import is_packed

__all__ = ["check_name", "export_gguf"]

_OF_WEIGHT_FORMAT = {"float32": Storage.F32, "float16": Storage.F16, "bfloat16": Storage.BF16}
_ENDS = tuple(f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))


def check_name(path: Path) -> None:
    """Raises `InvalidOption` for a file that would not be read as a model of its own."""
    is_part = any(model.num_parts != 1 for model in gguf_models([path.name]))
    if path.suffix.lower() != ".gguf" or is_part:
        raise InvalidOption(
            f"{path}: expected a name that ends in .gguf and is not that of a part of a split"
        )


def export_gguf(model: LoadedModel, path: Path, storage: Storage | None, pre: str | None) -> None:
    """Write a model; the file appears whole or not at all.

    Args:
        path: of the new file; one that is there is replaced.
        storage: the type of matrices; None: as they are, or as most of a checkpoint's are, F16 if
            those are quantized.
        pre: see `tokenizer_keys`.
    Raises:
        UnsupportedModel: GGUF cannot say what the model or its tokenizer does.
        InvalidOption: `path` or `pre` does not fit.
        OSError: the file cannot be written.
    """
    check_name(path)
    is_gguf = model.path.is_file()
    if pre is not None and (is_gguf or not model.has_tokenizer):
        why = "that of a GGUF file is copied" if is_gguf else "the model has none"
        raise InvalidOption(f"--pre {pre} has no place: it is for a tokenizer, and {why}")
    if is_gguf:
        copy_gguf(path, GgufFile(model.path), storage)
        return
    if is_packed(model.config.values):
        raise UnsupportedModel(
            f"{model.path}: its matrices are packed: export the checkpoint that it was made from"
        )
    storage = storage or _OF_WEIGHT_FORMAT.get(model.weight_format["name"], Storage.F16)
    others = _tokenizer_keys(model, pre) | sampling_keys(model.generation_config)
    write_gguf(path, model.graph, model.weights, model.config, others, storage)


def _tokenizer_keys(model: LoadedModel, pre: str | None) -> dict[str, Any]:
    """The tokenizer, and tokens that end an answer where readers do not find them by their text."""
    if not model.has_tokenizer:
        return {"tokenizer.ggml.model": "none"}
    keys = tokenizer_keys(model.tokenizer, model.graph.vocab_size, pre)
    ends = tokenizer_from_metadata(keys, "the new file").eog_token_ids
    missing = sorted(model.eos_token_ids - ends)
    places = [key for key in _ENDS if key not in keys]
    if len(missing) > len(places):
        raise UnsupportedModel(
            f"{len(missing)} tokens that end an answer have no place in GGUF: expected at most "
            f"{len(places)} beside those that are known by their text"
        )
    return keys | dict(zip(places, missing, strict=False))
