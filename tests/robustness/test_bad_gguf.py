"""Damaged GGUF files: one line that says what is wrong, bounded memory, no other exception."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_gguf import CASES, LLAMA_CPP_CASES
from bad_gguf_splits import given_path
from gguf_files import good_metadata, good_raw, good_tensors, make_good_gguf

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.formats.gguf import GgufFile

MEMORY_LIMIT = 3 * 2**30  # of address space; mapped libraries take most of it
GROWTH_LIMIT_KIB = 500 * 1024


def read_all(path: Path) -> GgufFile:
    """Open a file and decode every tensor."""
    file = GgufFile(path)
    for name in file.tensors:
        np.asarray(file.array(name))
    return file


def test_the_undamaged_files_are_read(tmp_path):
    (tmp_path / "raw.gguf").write_bytes(good_raw().bytes())
    assert list(read_all(tmp_path / "raw.gguf").tensors) == ["floats", "blocks", "halves"]
    make_good_gguf(tmp_path / "model.gguf")
    file = read_all(tmp_path / "model.gguf")
    assert set(file.tensors) == set(good_tensors())
    assert set(file.metadata) == set(good_metadata())


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(name, tmp_path):
    expected, damage = CASES[name]
    damage(tmp_path / "model.gguf")
    with pytest.raises((BadFile, UnsupportedModel)) as caught:
        read_all(given_path(tmp_path / "model.gguf"))
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 600
    assert ": " in message


def test_all_that_llama_cpp_refuses_is_among_them():
    assert set(LLAMA_CPP_CASES.values()) <= set(CASES)
    assert len(CASES) >= 120


def test_memory_is_bounded(tmp_path):
    """All cases in one process with a limit on its address space; each fails as before."""
    script = Path(__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=script.parent,
        env={"PYTHONPATH": str(script.parents[1]), "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def refuse_all_within_limits(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (_, damage) in CASES.items():
        path = folder / "case" / "model.gguf"
        path.parent.mkdir()
        damage(path)
        try:
            read_all(given_path(path))
        except (BadFile, UnsupportedModel):
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert growth < GROWTH_LIMIT_KIB, (name, growth)
        else:
            raise AssertionError(f"'{name}' was not refused")
        shutil.rmtree(path.parent)


if __name__ == "__main__":
    refuse_all_within_limits(Path(sys.argv[1]))
