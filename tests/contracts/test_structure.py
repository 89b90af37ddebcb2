"""Imports point one way, the engine knows no technique, files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vivace.registry import seams

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "vivace"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# A part may import parts of a lower level, and itself; parts of the top level may meet.
LEVELS = {
    "blocks": 0, "config": 0, "errors": 0, "plan": 0, "registry": 0, "types": 0,
    "_native": 0,
    "techniques": 1,
    "models": 2,
    "executors": 3,
    "engine": 4,
    "completion": 5,
    "llm": 6,
    "": 7,  # vivace/__init__.py hands names on
    "cli": 7, "measure": 7, "serve": 7, "training": 7, "tune": 7,
}  # fmt: skip
LEAVES = {name for name, level in LEVELS.items() if level == 0}
TORCH_FILES = re.compile(r"executors/torch_\w*\.py|training/.*")


def part_of(file: Path) -> str:
    first = file.parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports_of(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, at any depth; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not _is_type_only(file, node):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_type_only(file: Path, wanted: ast.ImportFrom) -> bool:
    """Whether an import stands under `if TYPE_CHECKING`: it never runs."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return any(
        isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
        and any(item.lineno <= wanted.lineno <= (item.end_lineno or 0) for item in node.body)
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(file)
    for name in imports_of(file):
        if not name.startswith("vivace."):
            continue
        other = name.split(".")[1]
        if other not in LEVELS:
            continue  # `from vivace import LLM`: a name of the package, seen by its own import
        assert (
            other == part
            or LEVELS[other] < LEVELS[part]
            or LEVELS[part] == max(LEVELS.values())
            or (other in LEAVES and part in LEAVES)
        ), f"{file} imports {name}"
        if other == "techniques" and part in ("engine", "executors", "models"):
            module = name.split(".")[3] if name.count(".") > 2 else "base"
            assert module == "base", f"{file} imports a technique: {name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_executors_and_training_import_torch(file: Path) -> None:
    if not TORCH_FILES.fullmatch(file.as_posix()):
        assert not {name for name in imports_of(file) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_unpickles(file: Path) -> None:
    text = (PACKAGE / file).read_text(encoding="utf-8")
    names = {name.split(".")[0] for name in imports_of(file)}
    assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    assert "torch.load(" not in text
    assert "allow_pickle=True" not in text


def test_the_engine_names_no_technique() -> None:
    names = {name for seam in seams().values() for name in seam.names()}
    for path in (PACKAGE / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_name = isinstance(node, ast.Constant) and node.value in names
            assert not is_name, f"{path.name} names the technique {ast.unparse(node)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                assert "Technique" not in ast.unparse(node), f"{path.name}: isinstance on one"


def test_no_file_is_called_utils() -> None:
    every = [path for folder in ("src", "tests", "tools") for path in (ROOT / folder).rglob("*")]
    assert not [path for path in every if path.stem in ("utils", "util", "helpers", "misc")]


# ---------------------------------------------------------------- twice the sizes of style.md


# Their callers name the few arguments that differ from the default.
MANY_ARGUMENTS = {("engine/engine.py", "__init__"), ("llm.py", "__init__")}


def limit_of(file: Path) -> int:
    if file.parts[0] == "techniques":
        return 300
    return 800


def test_files_are_small(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {file: len((PACKAGE / file).read_text("utf-8").splitlines()) for file in FILES}
    with capsys.disabled():
        largest = sorted(sizes, key=lambda file: -sizes[file])[:5]
        print("\nlargest files:", ", ".join(f"{file} {sizes[file]}" for file in largest))
    assert {file: size for file, size in sizes.items() if size > limit_of(file)} == {}
    assert sum(size for file, size in sizes.items() if file.parts[0] == "engine") <= 4000


@pytest.mark.parametrize("file", FILES, ids=str)
def test_functions_are_short_and_take_few_arguments(file: Path) -> None:
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 120, f"{file}: {node.name} has {length} lines"
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg != "self"]
            num_arguments = len(names) + len(node.args.kwonlyargs)
            limit = 16 if (file.as_posix(), node.name) in MANY_ARGUMENTS else 8
            assert num_arguments <= limit, f"{file}: {node.name} takes {num_arguments} arguments"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_module_says_what_it_is(file: Path) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
    assert docstring, f"{file} has no docstring"
