"""The files of `benchmarks.peers`: one random checkpoint per shape, and what others make of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from benchmarks import harness, shapes
from benchmarks.harness import LLAMA_CPP, OPENVINO, ROOT, VIVACE, run_quietly
from benchmarks.peer_cases import MODELS
from vivace.models.formats.gguf import GgufFile

Q4_0, Q8_0 = 2, 7  # llama_ftype


def prepare(scratch: Path, model: str, file: str) -> Path:
    """The path of a model's file, which is written where it is missing.

    Raises `NotInstalled` where the peer that writes it is missing.
    """
    path = scratch / model / file
    if file == "hf":
        return shapes.write_checkpoint(path, MODELS[model])
    if path.exists():
        return path
    source, write = FILES[file]
    source_path = prepare(scratch, model, source)
    print(f"writing {path}", flush=True)
    unfinished = path.with_name(f"unfinished-{file}")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    write(source_path, unfinished)
    return unfinished.rename(path)


@cache
def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors in a model's file, a head that is the embedding table once."""
    if path.suffix == ".gguf":
        return sum(info.num_bytes for info in GgufFile(path).tensors.values())
    weights = path / "openvino_model.bin"
    if weights.exists():
        return weights.stat().st_size
    weights = path / "model.safetensors"
    with weights.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    return weights.stat().st_size - 8 - header_bytes


def _export(storage: str, source: Path, target: Path) -> None:
    run_quietly([*VIVACE, "export", "--force", source, target, "--type", storage])


def _quantize(file_type: int, source: Path, target: Path) -> None:
    harness.require(LLAMA_CPP)
    script = ROOT / "tests/peers/llama_quantize.py"
    run_quietly([LLAMA_CPP, script, source, target, str(file_type)])


def _compress(bits: int, source: Path, target: Path) -> None:
    harness.require(OPENVINO)
    module = "benchmarks.engines.openvino_export"
    run_quietly([OPENVINO, "-m", module, source, target, str(bits)])


FILES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {  # by name: made of what, and how
    "f16.gguf": ("hf", partial(_export, "f16")),
    "bf16.gguf": ("hf", partial(_export, "bf16")),
    "q4_0.gguf": ("f16.gguf", partial(_quantize, Q4_0)),
    "q8_0.gguf": ("f16.gguf", partial(_quantize, Q8_0)),
    "openvino-int4": ("hf", partial(_compress, 4)),
    "openvino-int8": ("hf", partial(_compress, 8)),
}
