"""Which GGUF files make up a model and how it is quantized, told by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["GgufModel", "gguf_models", "select", "selector"]

_SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_NO_MODELS = ("mmproj", "imatrix")  # image projectors and statistics for quantizing
_DEFAULT_QUANTIZATION = "Q4_K_M"
# Delimiters are all but letters and digits: `_` stands within a quantization and around it.
_BEFORE, _AFTER = r"(?<![A-Z0-9])", r"(?![A-Z0-9])"
_QUANTIZATION = re.compile(
    rf"{_BEFORE}([IT]?Q\d(_\d|_K|_NL|_X*[SML])*|(MX|NV)FP4(_MOE)?|B?F16|F32|FP16|FP32){_AFTER}"
)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """One file, or the parts of a split in their order, of which some may be missing.

    Args:
        name: the path without the suffix and the number of the part.
        files: paths relative to the repository or directory.
        num_parts: how many files there should be.
    """

    name: str
    files: tuple[str, ...]
    num_parts: int

    @property
    def is_whole(self) -> bool:
        return len(self.files) == self.num_parts

    @property
    def quantization(self) -> str:
        """Such as `Q4_K_M`; the last one that the name holds, or nothing."""
        found = [match[0] for match in _QUANTIZATION.finditer(self.name.upper())]
        return found[-1] if found else ""

    def is_quantized_as(self, wanted: str) -> bool:
        """Whether `wanted` stands delimited in the name and holds all of its quantization."""
        wanted = wanted.upper()
        is_part = re.search(_BEFORE + re.escape(wanted) + _AFTER, self.name.upper())
        return is_part is not None and self.quantization in wanted

    def has_file(self, wanted: str) -> bool:
        """Whether one of the files has this path, or this name in a folder."""
        return any(f"/{file}".lower().endswith(f"/{wanted}".lower()) for file in self.files)


def gguf_models(paths: Iterable[str]) -> list[GgufModel]:
    """The models among the files of a repository or directory, sorted by name."""
    files: dict[tuple[str, str], list[str]] = {}
    for path in sorted(paths):
        file_name = path.rpartition("/")[2].lower()
        if file_name.endswith(_SUFFIX) and not any(word in file_name for word in _NO_MODELS):
            stem = path[: -len(_SUFFIX)]
            part = _PART.fullmatch(stem)
            files.setdefault((part[1], part[3]) if part else (stem, "1"), []).append(path)
    return [GgufModel(name, tuple(found), int(count)) for (name, count), found in files.items()]


def select(models: Sequence[GgufModel], wanted: str | None) -> list[GgufModel]:
    """The models that fit a quantization or the name of a file; with none, those of Q4_K_M, or
    else all."""
    if wanted is None:
        return select(models, _DEFAULT_QUANTIZATION) or list(models)
    if wanted.lower().endswith(_SUFFIX):
        return [model for model in models if model.has_file(wanted)]
    return [model for model in models if model.is_quantized_as(wanted)]


def selector(model: GgufModel, models: Sequence[GgufModel]) -> str:
    """What selects one of the models: its quantization, or its file where that is not enough."""
    quantization = model.quantization
    is_enough = quantization and select(models, quantization) == [model]
    return quantization if is_enough else model.files[0]
