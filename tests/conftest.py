"""Surroundings of all tests: no hub, one thread per library, and this folder on the path."""

import os
from pathlib import Path

import pytest

# Before any test imports what reads them; idle threads take address space, which some tests limit.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests: an empty working directory, no variables, no files."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("VIVACE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
