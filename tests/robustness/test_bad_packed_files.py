"""Damaged packed models: one line that says what to do, exit code 2, never wrong weights."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vivace import LLM, Plan, _native
from vivace.cli import main
from vivace.errors import BadFile, ModelError
from vivace.llm import weight_formats
from vivace.models.loading import load_model
from vivace.models.packing import write_model
from vivace.plan import resolve

pytestmark = pytest.mark.usefixtures("own_surroundings")
FILE = "model.safetensors"
Header = dict[str, Any]
Data = bytes | bytearray
Change = Callable[[Header, Data], Data | None]  # of a header and what follows it


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    model = load_model("tiny")
    plan = resolve(Plan.of(weight_formats="int4"))
    folder = tmp_path_factory.mktemp("good") / "model"
    write_model(model, weight_formats(model.graph, plan), folder)
    return folder


@pytest.fixture
def model(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


def open_model(path: Path) -> None:
    LLM(path).close()


def header_of(data: Data) -> tuple[Header, Data]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, change: Change) -> None:
    """Change the header and maybe the data; the checksum is made right again."""
    header, rest = header_of((path / FILE).read_bytes())
    rest = change(header, rest) or rest
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -(8 + len(text)) % 64)
    data = bytearray(struct.pack("<Q", len(text)) + text + rest)
    total = _native.checksum(np.frombuffer(data[:-8], np.uint8))
    data[-8:] = struct.pack("<Q", total)
    (path / FILE).write_bytes(data)


def test_the_undamaged_model_loads_and_so_does_one_rewritten(model) -> None:
    open_model(model)
    rewrite(model, lambda header, rest: None)
    open_model(model)


# ---------------------------------------------------------------- what a header may say wrongly

KERNEL = "int4/32/float16"
NAME = "model.layers.0.self_attn.q_proj.weight"


def in_metadata(key: str, value: Any) -> Change:
    def change(header: Header, rest: Data) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    return change


def in_matrices(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change what the metadata say of matrices by kernel."""

    def apply(header: Header, rest: Data) -> None:
        matrices = json.loads(header["__metadata__"]["matrices"])
        change(matrices)
        header["__metadata__"]["matrices"] = json.dumps(matrices)

    return apply


def shaped(change: Callable[[list[int]], Any]) -> Change:
    """Replace the shape of one matrix."""
    return in_matrices(lambda m: m[KERNEL].update({NAME: change(m[KERNEL][NAME])}))


def of_kernel(kernel: str) -> Change:
    """Say that another kernel reads one matrix."""
    return in_matrices(lambda m: m.update({kernel: {NAME: m[KERNEL].pop(NAME)}}))


def without_metadata(header: Header, rest: Data) -> None:
    del header["__metadata__"]


def without_sum(header: Header, rest: Data) -> Data:
    del header["checksum"]
    return rest[:-8]


def renamed(header: Header, rest: Data) -> None:
    header["other"] = header.pop(NAME)


def infinite_scale(header: Header, rest: Data) -> Data:
    first, _ = header[NAME]["data_offsets"]
    return rest[:first] + b"\x00\x7c" + rest[first + 2 :]


HEADERS: dict[str, tuple[Change, str]] = {
    "no metadata": (without_metadata, "do not say what its matrices mean"),
    "other format": (in_metadata("format", "pt"), "do not say what its matrices mean"),
    "no version": (in_metadata("version", None), "for version None, this program reads 3"),
    "later version": (in_metadata("version", "4"), "for version '4', this program reads 3"),
    "unknown dtype": (in_metadata("dtype", "float8"), "dtype is 'float8': expected one of float32"),
    "no matrices": (in_metadata("matrices", None), "matrices is None: expected JSON"),
    "matrices are no JSON": (in_metadata("matrices", "{"), "matrices: is not JSON"),
    "matrices are a list": (in_metadata("matrices", "[]"), "expected a JSON object"),
    "metadata of numbers": (in_metadata("version", 3), "for version 3, this program reads 3"),
    "unknown kernel": (of_kernel("int5/32/float16"), "no kernel for the format"),
    "other kernel": (of_kernel("int4/64/float16"), "takes uint8"),
    "a kernel without end": (of_kernel("x" * 5000), "expected names and shapes"),
    "the same matrix twice": (
        in_matrices(lambda m: m.update({"int4/32/bfloat16": dict(m[KERNEL])})),
        "is of int4/32/float16 and of 'int4/32/bfloat16'",
    ),
    "matrices of a kernel a list": (
        in_matrices(lambda m: m.update({KERNEL: [NAME]})),
        "expected names and shapes",
    ),
    "a group that does not divide": (
        shaped(lambda m: [m[0], m[1] + 1]),
        "do not divide into groups of 32",
    ),
    "more rows": (shaped(lambda m: [m[0] + 16, m[1]]), "takes uint8"),
    "another shape of as many bytes": (shaped(lambda m: [m[0] - 1, m[1]]), "the config expects"),
    "no rows": (shaped(lambda m: [0, m[1]]), "expected sizes of 1 or more"),
    "negative rows": (shaped(lambda m: [-16, m[1]]), "expected sizes of 1 or more"),
    "rows beyond 32 bits": (shaped(lambda m: [2**40, m[1]]), "expected rows, columns"),
    "rows a text": (shaped(lambda m: ["16", m[1]]), "expected rows, columns"),
    "no columns": (shaped(lambda m: m[:1]), "expected rows, columns"),
    "a matrix without meaning": (in_matrices(lambda m: m[KERNEL].pop(NAME)), "is stored as uint8"),
    "a matrix that is missing": (renamed, "is missing"),
    "no checksum": (without_sum, "does not end in a checksum"),
    "an infinite scale": (infinite_scale, "NaN or inf"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_header_is_refused(model, case: str) -> None:
    change, message = HEADERS[case]
    rewrite(model, change)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(model)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- damaged bytes


def boundaries(data: Data) -> list[int]:
    """Ends of the length, the header and all tensors."""
    header, rest = header_of(data)
    start = len(data) - len(rest)
    ends = {entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"}
    return sorted({0, 8, start, *(start + end for end in ends)} - {len(data)})


def test_a_file_cut_short_anywhere_is_refused(model) -> None:
    data = (model / FILE).read_bytes()
    cuts = {cut + off for cut in boundaries(data) for off in (-1, 0, 1)}
    for cut in sorted(cuts & set(range(len(data)))):
        (model / FILE).write_bytes(data[:cut])
        with pytest.raises(BadFile):
            open_model(model)
    (model / FILE).write_bytes(data + b"\0")
    with pytest.raises(BadFile, match="data appended"):
        open_model(model)


def test_a_flipped_bit_anywhere_is_seen(model) -> None:
    data = bytearray((model / FILE).read_bytes())
    start = len(data) - len(header_of(data)[1])
    places = [*boundaries(data), *range(0, start, 997), *range(start, len(data), len(data) // 40)]
    for place in sorted({*places, len(data) - 1}):
        data[place] ^= 4
        (model / FILE).write_bytes(data)
        with pytest.raises(ModelError):
            open_model(model)
        data[place] ^= 4
    (model / FILE).write_bytes(data)
    open_model(model)


def test_swapped_pieces_are_seen(model) -> None:
    data = (model / FILE).read_bytes()
    first, second, rest = 2**20, 2**21, 3 * 2**20  # the pieces that a checksum is made of
    swapped = data[:first] + data[second:rest] + data[first:second] + data[rest:]
    assert len(swapped) == len(data)
    (model / FILE).write_bytes(swapped)
    with pytest.raises(BadFile, match="is damaged"):
        open_model(model)


def test_the_command_line_says_it_in_one_line(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    data = bytearray((model / FILE).read_bytes())
    data[-5000] ^= 1
    (model / FILE).write_bytes(data)
    assert main(["run", str(model), "Hello"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "its checksum does not fit): quantize the model again" in error
    assert error.count("\n") == 1


def test_shards_of_a_packed_model_are_no_packed_model(model) -> None:
    (model / FILE).rename(model / "model-00001-of-00002.safetensors")
    with pytest.raises(BadFile, match=r"model\.safetensors: is missing"):
        open_model(model)


def test_a_config_of_another_model_is_refused(model) -> None:
    config = json.loads((model / "config.json").read_text())
    config["intermediate_size"] //= 2
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="config and weights are not of one model"):
        open_model(model)


def test_a_config_that_forgets_the_packing_is_refused(model) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        open_model(model)
