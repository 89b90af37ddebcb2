"""What every technique promises, for all seams: a new file is tested without a new test."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from vivace.errors import InvalidOption, UnknownOption, UnknownTechnique
from vivace.plan import DEFAULTS, Plan, resolve
from vivace.registry import Maturity, Technique, TechniqueInfo, seams
from vivace.types import Change, Exactness, Need

ROOT = Path(__file__).parents[2]
SEAMS = seams()
TECHNIQUES = [(seam, name) for seam in SEAMS for name in SEAMS[seam].names()]
PAPERS = tomllib.loads((ROOT / "docs" / "papers.toml").read_text(encoding="utf-8"))

each_technique = pytest.mark.parametrize(("seam", "name"), TECHNIQUES)
each_seam = pytest.mark.parametrize("seam", SEAMS)


def module_of(seam: str, name: str) -> types.ModuleType:
    return SEAMS[seam].load(name)


def test_there_are_techniques() -> None:
    assert {seam for seam, _ in TECHNIQUES} == set(SEAMS)
    assert set(DEFAULTS) <= set(SEAMS)


@each_technique
def test_info_is_complete(seam: str, name: str) -> None:
    info = module_of(seam, name).INFO
    assert isinstance(info, TechniqueInfo)
    assert 10 <= len(info.summary) <= 100
    assert isinstance(info.maturity, Maturity)
    assert set(info.papers) <= set(PAPERS), "add the paper to docs/papers.toml"


@each_technique
def test_config_is_frozen_and_has_defaults(seam: str, name: str) -> None:
    config = module_of(seam, name).Config
    made = config()
    for item in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, item.name, getattr(made, item.name))
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]


@each_technique
def test_properties_have_their_types(seam: str, name: str) -> None:
    technique = SEAMS[seam].create(name)
    assert technique.name == name
    assert isinstance(technique.exactness, Exactness)
    assert all(isinstance(need, Need) for need in technique.needs)
    assert all(isinstance(change, Change) for change in technique.changes)
    again = SEAMS[seam].create(name, **technique.options())
    assert again.config == technique.config


@each_technique
def test_unknown_options_and_wrong_types_are_refused(seam: str, name: str) -> None:
    with pytest.raises(UnknownOption, match="no option 'no_such_option'"):
        SEAMS[seam].create(name, no_such_option=1)
    for item in dataclasses.fields(module_of(seam, name).Config):
        with pytest.raises(InvalidOption, match=f"option '{item.name}'"):
            SEAMS[seam].create(name, **{item.name: object()})


@each_technique
def test_docstrings(seam: str, name: str) -> None:
    module = module_of(seam, name)
    assert len((module.__doc__ or "").strip().splitlines()) == 1, "one line that names the idea"
    technique = type(SEAMS[seam].create(name))
    lines = inspect.cleandoc(technique.__doc__ or "").splitlines()
    assert 1 <= len(lines) <= 15
    assert any(line.startswith("Cost:") for line in lines)
    if module.INFO.papers:
        assert any(line.startswith("Paper:") for line in lines)
    for item in dataclasses.fields(module.Config):
        assert any(line.strip().startswith(f"{item.name}:") for line in lines), item.name


@each_technique
def test_a_technique_knows_no_other(seam: str, name: str) -> None:
    """Imports only leaves, its seam's base, and its seam's families (with a leading `_`)."""
    source = inspect.getsource(module_of(seam, name))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vivace.techniques"):
            parts = (node.module or "").split(".")
            assert parts[2] == seam
            assert parts[3] == "base" or parts[3].startswith("_")


@each_seam
def test_base_is_small_and_abstract(seam: str) -> None:
    module = __import__(f"vivace.techniques.{seam}.base", fromlist=["base"])
    (base,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Technique)
        and value.__module__ == module.__name__
    )
    methods = [
        name
        for name, value in vars(base).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    ]
    assert 1 <= len(methods) <= 6, methods
    assert inspect.isabstract(base)
    assert all(issubclass(type(SEAMS[seam].create(name)), base) for name in SEAMS[seam].names())


@each_seam
def test_unknown_names_are_refused_with_the_nearest(seam: str) -> None:
    name = SEAMS[seam].names()[0]
    with pytest.raises(
        UnknownTechnique, match=f"no {seam} technique '{name}x': did you mean.*{name}"
    ):
        SEAMS[seam].create(name + "x")


def test_names_are_listed_without_importing() -> None:
    code = (
        "import sys; from vivace.registry import seams\n"
        "names = [f'vivace.techniques.{s}.{n}' for s in seams() for n in seams()[s].names()]\n"
        "assert names and not set(names) & set(sys.modules), set(names) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_plan_is_exact() -> None:
    assert resolve(Plan().with_defaults(DEFAULTS)).exactness is Exactness.EXACT
