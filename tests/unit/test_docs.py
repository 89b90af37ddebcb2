"""What the pages claim is so: papers name their techniques and tests, generated pages are fresh."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from vivace.config import SETTINGS
from vivace.models import families
from vivace.models.quantized.tensors import METHODS
from vivace.registry import seams

ROOT = Path(__file__).parents[2]
PAPERS = tomllib.loads((ROOT / "docs" / "papers.toml").read_text(encoding="utf-8"))


def test_every_cited_paper_is_listed_with_its_technique() -> None:
    cited = {
        (paper, f"{seam.name}.{name}")
        for seam in seams().values()
        for name in seam.names()
        for paper in seam.info(name).papers
    }
    others = {f"families.{name}" for name in families()} | {f"settings.{n}" for n in SETTINGS}
    others |= {f"checkpoints.{name}" for name in METHODS}
    listed = {(paper, by) for paper, entry in PAPERS.items() for by in entry["by"]}
    assert {item for item in listed if item[1] not in others} == cited


def test_every_listed_paper_has_tests_that_exist() -> None:
    for paper, entry in PAPERS.items():
        assert set(entry) == {"title", "source", "by", "tests"}, paper
        assert entry["tests"], paper
        for test in entry["tests"]:
            assert (ROOT / test).is_file(), f"{paper}: {test}"


def test_the_page_of_techniques_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "techniques_page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
