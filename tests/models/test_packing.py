"""Packed models: a directory computes what packing on the fly does, or is not there."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import checkpoint, random_tokens
from safetensors import safe_open

from vivace import LLM, Plan
from vivace.blocks import matrix_roles
from vivace.errors import BadFile, InvalidOption, UnsupportedModel
from vivace.llm import weight_formats
from vivace.models import weight_cache
from vivace.models.formats.packed_file import HugePageWriter
from vivace.models.gguf.export import export_gguf
from vivace.models.loading import load_model
from vivace.models.packing import packed_names, write_model
from vivace.plan import resolve
from vivace.techniques.weight_formats.base import Packed

# Transposed matrices, parts of one tensor, experts with routers, heads that executors leave out.
VARIANTS = ("llama", "gpt2", "phi3", "qwen2_moe", "mimo", "gemma2")
TOKENS = random_tokens(20)


def quantize(source: str | Path, folder: Path, *formats: str | dict) -> Path:
    model = load_model(source)
    plan = resolve(Plan.from_dict({"weight_formats": list(formats)}))
    write_model(model, weight_formats(model.graph, plan), folder)
    return folder


def logits(model: str | Path, **options) -> np.ndarray:
    with LLM(model, **options) as llm:
        return np.concatenate(list(llm.logits(TOKENS.tolist())))


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_model_computes_what_packing_on_the_fly_does(variant, tmp_path) -> None:
    (tmp_path / "source").mkdir()
    checkpoint(variant, tmp_path / "source")
    packed = quantize(tmp_path / "source", tmp_path / "packed", "int8")
    expected = logits(tmp_path / "source", weights="int8")
    np.testing.assert_array_equal(logits(packed), expected)
    assert not np.array_equal(expected, logits(tmp_path / "source"))


def test_roles_may_have_formats_of_their_own(tmp_path) -> None:
    formats = ("int4", {"name": "bfloat16", "role": "head"})
    packed = quantize("tiny", tmp_path / "packed", *formats)
    weights = load_model(packed).weights
    kernels = {weights[name].kernel for name in weights if isinstance(weights[name], Packed)}
    assert kernels == {"int4/32/float16", "bfloat16"}
    plan = Plan.from_dict({"weight_formats": list(formats)})
    np.testing.assert_array_equal(logits(packed), logits("tiny", plan=plan))


def test_defaults_are_those_of_the_checkpoint(tmp_path) -> None:
    packed = quantize("tiny", tmp_path / "packed", "int4")
    with LLM(packed) as llm, LLM("tiny") as source:
        assert llm.plan.one("weight_formats").name == "stored"
        assert llm.plan.one("kv_stores").name == source.plan.one("kv_stores").name == "bfloat16"
        assert llm.tokenizer.encode("def f():") == source.tokenizer.encode("def f():")
        assert llm.model.eos_token_ids == source.model.eos_token_ids
        assert llm.default_params() == source.default_params()
    assert LLM.estimate(packed).weight_bytes == LLM.estimate("tiny", weights="int4").weight_bytes


def test_the_declared_bytes_are_those_in_the_file(tmp_path) -> None:
    formats = ({"name": "int3", "symmetric": False}, {"name": "int8", "role": "head"})
    packed = quantize("tiny", tmp_path / "packed", *formats)
    model = load_model(packed)
    stored = {ref.name: model.weights.info(ref.name).num_bytes for ref in matrix_roles(model.graph)}
    plan = Plan.from_dict({"weight_formats": list(formats)})
    assert sum(stored.values()) == LLM.estimate("tiny", plan=plan).weight_bytes


def test_the_file_is_safetensors_with_aligned_data(tmp_path) -> None:
    path = quantize("tiny", tmp_path / "packed", "int4") / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    start = 8 + length
    header = json.loads(data[8:start])
    (matrices,) = json.loads(header["__metadata__"]["matrices"]).values()
    assert start % 64 == 0
    assert all((start + header[name]["data_offsets"][0]) % 64 == 0 for name in matrices)
    model = load_model("tiny")
    assert set(matrices) == set(packed_names(model.graph).values())
    with safe_open(path, "np") as other:
        assert set(other.keys()) == set(header) - {"__metadata__"}


def test_files_are_written_in_whole_huge_pages() -> None:
    pieces = []

    class File:
        def write(self, data: bytearray) -> None:
            pieces.append(bytes(data))

    writer = HugePageWriter(File())
    data = np.random.default_rng(0).integers(0, 256, 5 * 2**20 + 17, np.uint8)
    for first, last in ((0, 0), (0, 100), (100, 3 * 2**20), (3 * 2**20, len(data))):
        writer.write(data[first:last].data)
    writer.flush()
    assert b"".join(pieces) == data.tobytes()
    assert {len(piece) for piece in pieces[:-1]} == {2 * 2**20}


def test_matrices_are_views_of_the_mapped_file(tmp_path) -> None:
    packed = quantize("tiny", tmp_path / "packed", "int4")
    model = load_model(packed)
    (ref, *_) = matrix_roles(model.graph)
    first, second = model.weights[ref.name], model.weights[ref.name]
    assert first.raw.ctypes.data == second.raw.ctypes.data
    assert not first.raw.flags.writeable


def test_a_packed_model_can_be_packed_otherwise(tmp_path) -> None:
    first = quantize("tiny", tmp_path / "first", "int8")
    second = quantize(first, tmp_path / "second", "int4")
    np.testing.assert_array_equal(logits(second), logits(first, weights="int4"))


# ---------------------------------------------------------------- what is not


def test_a_folder_that_is_not_empty_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    quantize("tiny", tmp_path / "empty", "int4")
    with pytest.raises(InvalidOption, match="not an empty directory: choose another name"):
        quantize("tiny", tmp_path / "empty", "int4")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidOption, match="not an empty directory"):
        quantize("tiny", tmp_path / "file", "int4")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_gguf_file_is_refused(tmp_path) -> None:
    export_gguf(load_model("tiny"), tmp_path / "tiny.gguf", None, "gpt-2")
    with pytest.raises(UnsupportedModel, match="run it with --weights"):
        quantize(tmp_path / "tiny.gguf", tmp_path / "packed", "int4")


def test_a_packed_model_is_not_exported(tmp_path) -> None:
    packed = quantize("tiny", tmp_path / "packed", "int4")
    with pytest.raises(UnsupportedModel, match="export the checkpoint that it was made from"):
        export_gguf(load_model(packed), tmp_path / "tiny.gguf", None, "gpt-2")


@pytest.mark.parametrize("weights", ["int4:group_size=64", "table:preset=nf4"])
@pytest.mark.parametrize("folder", ["off", "cache"])
def test_a_group_that_does_not_divide_is_refused(weights: str, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 0)
    (tmp_path / "source").mkdir()
    checkpoint("llama", tmp_path / "source")
    message = r"tensor 'model.layers.0.mlp.down_proj.weight': groups of 64 do not divide rows of 96"
    with pytest.raises(InvalidOption, match=message):
        LLM(
            tmp_path / "source",
            weights=weights,
            weight_cache="off" if folder == "off" else tmp_path,
        )
    with pytest.raises(InvalidOption, match=message):
        LLM.estimate(tmp_path / "source", weights=weights)


def test_nothing_is_left_when_packing_fails(tmp_path) -> None:
    (tmp_path / "source").mkdir()
    checkpoint("llama", tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidOption, match=r"groups of 64 do not divide rows of 96 weights"):
        quantize(tmp_path / "source", tmp_path / "out" / "m", {"name": "int4", "group_size": 64})
    assert left_in(tmp_path / "out") == []


def test_nothing_is_left_after_an_interrupt(tmp_path) -> None:
    def interrupt(name: str, packed: Packed) -> None:
        raise KeyboardInterrupt

    model = load_model("tiny")
    formats = weight_formats(model.graph, resolve(Plan.of(weight_formats="int4")))
    with pytest.raises(KeyboardInterrupt):
        write_model(model, formats, tmp_path / "packed", interrupt)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("num_bytes", [0, 100, 1 << 20])
def test_nothing_is_left_when_the_disk_is_full(tmp_path, num_bytes: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            quantize("tiny", tmp_path / "packed", "int4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(tmp_path) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from vivace.llm import weight_formats\n"
        "from vivace.models.loading import load_model\n"
        "from vivace.models.packing import write_model\n"
        "from vivace.plan import Plan, resolve\n"
        "model = load_model('tiny')\n"
        "formats = weight_formats(model.graph, resolve(Plan.of(weight_formats='int4')))\n"
        "die = lambda name, packed: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_model(model, formats, Path(sys.argv[1]), die)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "packed")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (unfinished,) = left_in(tmp_path)
    assert left_in(tmp_path / unfinished) != []
    (tmp_path / ".mine.unfinished").write_text("of another name")
    quantize("tiny", tmp_path / "packed", "int4")
    assert left_in(tmp_path) == [".mine.unfinished", "packed"]


def test_of_two_runs_at_once_the_first_to_end_stays(tmp_path) -> None:
    def run_other(name: str, packed: Packed) -> None:
        if "packed" not in left_in(tmp_path):
            quantize("tiny", tmp_path / "packed", "int8")
            assert len(left_in(tmp_path)) == 2  # what this run has written is still there

    model = load_model("tiny")
    formats = weight_formats(model.graph, resolve(Plan.of(weight_formats="int4")))
    with pytest.raises(OSError, match="not empty"):
        write_model(model, formats, tmp_path / "packed", run_other)
    assert left_in(tmp_path) == ["packed"]
    np.testing.assert_array_equal(logits(tmp_path / "packed"), logits("tiny", weights="int8"))


def test_a_damaged_model_is_not_packed_again(tmp_path) -> None:
    packed = quantize("tiny", tmp_path / "packed", "int8")
    data = bytearray((packed / "model.safetensors").read_bytes())
    data[-5000] ^= 1
    (packed / "model.safetensors").write_bytes(data)
    with pytest.raises(BadFile, match="its checksum does not fit"):
        quantize(packed, tmp_path / "again", "int4")
    assert left_in(tmp_path) == ["packed"]


@pytest.mark.parametrize("scale_type", ["float32", "float16"])
def test_kernels_may_have_long_names(scale_type: str, tmp_path) -> None:
    values = [(-1) ** index * 1.2345678e-05 * (index + 1) for index in range(64)]
    weights = {"name": "table", "values": values, "scale_type": scale_type}
    packed = quantize("tiny", tmp_path / "packed", weights)
    np.testing.assert_array_equal(logits(packed), logits("tiny", weights=weights))
