"""Damaged checkpoints: one line that says what to do, exit code 2, bounded memory, no traceback."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_files import CASES, make_good

from vivace.cli import main
from vivace.errors import BadFile, ModelError, ModelNotFound, UnsupportedModel
from vivace.models.formats import safetensors
from vivace.models.loading import load_model

pytestmark = pytest.mark.usefixtures("own_surroundings")
MEMORY_LIMIT = 3 * 2**30  # of address space; mapped libraries take most of it
GROWTH_LIMIT_KIB = 700 * 1024


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model"
    make_good(path)
    return path


@pytest.fixture
def no_stdin(monkeypatch):
    """Nothing is piped in."""
    monkeypatch.setattr(sys, "stdin", None)


@pytest.fixture
def damaged(good, tmp_path):
    """A function from a case's name to the directory of a checkpoint damaged that way."""

    def damage(name: str) -> Path:
        path = tmp_path / "model"
        shutil.copytree(good, path)
        CASES[name][1](path)
        return path

    return damage


def load_all(path: Path) -> None:
    """What running a model reads: graph, weights, tokenizer, template."""
    model = load_model(path)
    assert model.tokenizer.vocab_size <= model.graph.vocab_size
    assert model.eos_token_ids


def test_the_undamaged_checkpoint_loads(good):
    load_all(good)
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(name, damaged):
    path = damaged(name)
    with pytest.raises(ModelError) as caught:
        load_all(path)
    message = str(caught.value)
    assert re.search("|".join(map(re.escape, CASES[name][0].split("|"))), message)
    assert "\n" not in message
    assert len(message) < 600
    assert ":" in message


@pytest.mark.usefixtures("no_stdin")
@pytest.mark.parametrize("name", CASES)
def test_command_line_exits_with_2(name, damaged, capfd):
    code = main(["run", str(damaged(name)), "hello"])
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ")


SUBPROCESS_CASES = ("header length 2^63", "NaN weights", "config: not JSON", "tokenizer: empty")


@pytest.mark.parametrize("name", SUBPROCESS_CASES)
def test_a_real_process_exits_with_2(name, damaged):
    command = [sys.executable, "-m", "vivace.cli", "run", str(damaged(name)), "hello"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("no_stdin")
def test_debug_shows_the_traceback(damaged, capfd):
    path = damaged("config: not JSON")
    assert main(["run", str(path), "hello", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


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
    )
    assert done.returncode == 0, done.stderr[-2000:]


def refuse_all_within_limits(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    good = folder / "good"
    make_good(good)
    load_all(good)
    for index, (_, damage) in enumerate(CASES.values()):
        path = folder / str(index)
        shutil.copytree(good, path)
        damage(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_all(path)
        except ModelError:
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert after - before < GROWTH_LIMIT_KIB, (index, after - before)
        else:
            raise AssertionError(f"case {index} was not refused")
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- what is good stays good


def test_a_hundred_thousand_unused_tensors_elsewhere_are_accepted(good, tmp_path):
    import bad_files

    path = tmp_path / "model"
    shutil.copytree(good, path)
    header, data = bad_files.header_of(bad_files.good_tensors())
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    header |= {f"extra.{index}": empty for index in range(100_000)}
    bad_files.write_raw(path / "model.safetensors", bad_files.json.dumps(header).encode(), data)
    load_all(path)


def test_reads_what_the_safetensors_library_writes(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    arrays = {
        "half": rng.normal(size=(3, 5)).astype(np.float16),
        "single": rng.normal(size=(7,)).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "bytes": rng.integers(0, 255, (3, 3, 3), dtype=np.uint8),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "np"})
    file = safetensors.SafetensorsFile(tmp_path / "a.safetensors")
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        read = file.array(name)
        assert read.dtype == array.dtype
        assert not read.flags.writeable or read.size == 0
        np.testing.assert_array_equal(read, array)


def test_unaligned_data_is_read(good, tmp_path):
    import bad_files

    tensors = bad_files.good_tensors()
    header, data = bad_files.header_of(tensors)
    text = bad_files.json.dumps(header).encode()
    bad_files.write_raw(tmp_path / "a.safetensors", text + b" " * ((1 - len(text)) % 4), data)
    file = safetensors.SafetensorsFile(tmp_path / "a.safetensors")
    for name, array in tensors.items():
        assert file.array(name).flags.aligned
        np.testing.assert_array_equal(file.array(name), array)


def test_locations_that_are_no_model(tmp_path):
    for name, error in {
        "pytorch_model.bin": UnsupportedModel,
        "config.json": UnsupportedModel,
        "notes.txt": UnsupportedModel,
    }.items():
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(error):
            load_model(tmp_path / name)
    for name in ("", "\0", "x" * 5000, "no/such/place", "./nowhere", "tinny", "a/../b"):
        with pytest.raises(ModelNotFound):
            load_model(name)
    with pytest.raises(ModelNotFound, match="did you mean tiny"):
        load_model("tinny")


def test_every_weight_can_be_searched(good, tmp_path, monkeypatch):
    """Opening a large checkpoint does not search it all; `check_all_weights` names the tensor."""
    import bad_files

    from vivace.models import loading

    path = tmp_path / "model"
    shutil.copytree(good, path)
    bad_files.CASES["NaN weights"][1](path)
    monkeypatch.setattr(loading, "_SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(loading, "_SMALL_TENSOR_BYTES", 100)
    model = load_model(path)
    with pytest.raises(BadFile, match="q_proj"):
        model.check_all_weights()


if __name__ == "__main__":
    refuse_all_within_limits(Path(sys.argv[1]))
