"""The cache of packed weights: made once, mapped then, never wrong and never an error."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import checkpoint
from quantized_files import kind, quantize_checkpoint

from vivace import LLM, Plan
from vivace.errors import InvalidOption
from vivace.llm import weight_formats
from vivace.models import weight_cache
from vivace.models.formats.packed_file import PackedFile
from vivace.models.formats.unfinished import whole_file
from vivace.models.gguf.export import export_gguf
from vivace.models.loading import load_model
from vivace.models.location import shipped
from vivace.models.weight_cache import cache_folder, packed_weights
from vivace.plan import resolve

TOKENS = list(range(5, 25))


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch) -> None:
    monkeypatch.setattr(weight_cache, "MIN_BYTES", 0)


@pytest.fixture
def source(tmp_path) -> Path:
    return shutil.copytree(shipped()["tiny"], tmp_path / "source")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "packed"


def logits(model: Path, cache: str | Path, weights: str = "int4") -> np.ndarray:
    with LLM(model, weights=weights, weight_cache=cache) as llm:
        return np.concatenate(list(llm.logits(TOKENS)))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_the_second_start_maps_what_the_first_has_packed(source, folder, caplog) -> None:
    expected = logits(source, "off")
    np.testing.assert_array_equal(logits(source, folder), expected)
    (entry,) = entries(folder)
    written = entry.stat()
    np.testing.assert_array_equal(logits(source, folder), expected)
    assert [path.stat().st_ino for path in entries(folder)] == [written.st_ino]
    with LLM(source, weights="int4", weight_cache=folder):
        assert str(entry) in Path("/proc/self/maps").read_text()
    assert caplog.text == ""


def test_a_gguf_file_is_packed_likewise(source, folder, tmp_path) -> None:
    file = tmp_path / "tiny.gguf"
    export_gguf(load_model(source), file, None, "gpt-2")
    expected = logits(file, "off")
    for _ in range(2):
        np.testing.assert_array_equal(logits(file, folder), expected)
    assert len(entries(folder)) == 1


def test_each_format_has_an_entry(source, folder) -> None:
    for weights in ("int4", "int4:group_size=64", "int4:symmetric=false", "int8", "bfloat16"):
        logits(source, folder, weights)
    assert len(entries(folder)) == 4  # bfloat16 is read where the checkpoint has it


def test_the_entry_of_a_model_that_changed_is_replaced(source, folder, caplog) -> None:
    before = logits(source, folder)
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4000] ^= 0x10
    times = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    expected = logits(source, "off")
    np.testing.assert_array_equal(logits(source, folder), expected)
    assert caplog.text.count("the model has changed since: packing it again") == 1
    caplog.clear()
    np.testing.assert_array_equal(logits(source, folder), expected)
    assert caplog.text == ""
    assert len(entries(folder)) == 1
    assert before.shape == expected.shape


def test_a_model_of_the_same_size_and_time_is_another(source, folder, caplog) -> None:
    logits(source, folder)
    file, times = source / "model.safetensors", (source / "model.safetensors").stat()
    data = bytearray(file.read_bytes())
    data[-4000] ^= 0x10
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    np.testing.assert_array_equal(logits(source, folder), logits(source, "off"))
    assert caplog.text.count("the model has changed since: packing it again") == 1


def test_a_file_that_is_replaced_while_it_is_packed_is_packed_again(source, folder) -> None:
    model, file = load_model(source), source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4000] ^= 0x10
    file.with_name("new").write_bytes(data)
    file.with_name("new").replace(file)  # the model still has the old one mapped
    plan = resolve(Plan.of(weight_formats="int4"))
    packed_weights(model, weight_formats(model.graph, plan), folder)
    np.testing.assert_array_equal(logits(source, folder), logits(source, "off"))


def test_codes_that_others_packed_are_kept_too(folder, tmp_path, caplog) -> None:
    source = tmp_path / "source"
    checkpoint("llama", source)
    config, gptq = kind("gptq")
    quantize_checkpoint(source, config, gptq)
    expected = logits(source, "off", "stored")
    for _ in range(2):
        np.testing.assert_array_equal(logits(source, folder, "stored"), expected)
    (entry,) = entries(folder)
    kernels = {matrix.kernel for matrix in PackedFile(entry).matrices().values()}
    assert kernels == {"int4/32/float16/zeros"}
    # The same files mean something else in another dialect.
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (source / "config.json").write_text(json.dumps(fields))
    other = logits(source, "off", "stored")
    assert not np.array_equal(other, expected)
    np.testing.assert_array_equal(logits(source, folder, "stored"), other)


def test_what_a_killed_process_left_is_removed(source, folder) -> None:
    folder.mkdir(parents=True)
    left = folder / ".other-0123456789abcdef.safetensors.0123456789abcdef.unfinished"
    left.write_bytes(b"half")
    with whole_file(folder / "other") as unfinished:
        logits(source, folder)
        assert unfinished.exists()
    assert not left.exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "not ours"])
def test_a_damaged_entry_is_made_again(source, folder, damage: str, caplog) -> None:
    expected = logits(source, folder)
    (entry,) = entries(folder)
    data = bytearray(entry.read_bytes())
    match damage:
        case "flipped":
            data[len(data) // 2] ^= 1
        case "cut":
            del data[len(data) // 2 :]
        case "empty":
            data.clear()
        case "not ours":
            data = bytearray((source / "model.safetensors").read_bytes())
    entry.write_bytes(data)
    np.testing.assert_array_equal(logits(source, folder), expected)
    assert caplog.text.count("cannot be used any more: packing the model again") == 1
    caplog.clear()
    np.testing.assert_array_equal(logits(source, folder), expected)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_made_is_no_error(source, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    expected = logits(source, "off")
    np.testing.assert_array_equal(logits(source, tmp_path / "file" / "cache"), expected)
    assert (
        caplog.text.count("packed weights are not kept for the next start (Not a directory)") == 1
    )


def test_a_full_disk_is_no_error(source, folder, caplog) -> None:
    expected = logits(source, "off")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        np.testing.assert_array_equal(logits(source, folder), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "packed weights are not kept for the next start (File too large)" in caplog.text
    assert entries(folder) == []


def test_processes_may_share_a_folder(source, folder) -> None:
    code = (
        "import sys; from vivace import LLM; from vivace.models import weight_cache\n"
        "weight_cache.MIN_BYTES = 0\n"
        "for _ in range(3):\n"
        "    llm = LLM(sys.argv[1], weights='int4', weight_cache=sys.argv[2])\n"
        "    print(sum(rows.sum(dtype='float64') for rows in llm.logits(list(range(5, 25)))))\n"
    )
    command = [sys.executable, "-c", code, str(source), str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert len(set(printed[0] + printed[1])) == 1
    assert len(entries(folder)) == 1


def test_small_models_are_not_kept(source, folder, monkeypatch) -> None:
    monkeypatch.undo()
    logits(source, folder)
    assert not folder.exists()


def test_where_the_cache_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "vivace" / "packed"
    assert cache_folder("~/here") == Path.home() / "here"
    assert cache_folder("off") is None
    with pytest.raises(InvalidOption, match="expected a path, or off"):
        cache_folder("")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_folder(None) == Path.home() / ".cache" / "vivace" / "packed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "vivace" / "packed"
