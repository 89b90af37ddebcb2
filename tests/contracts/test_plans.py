"""Which made-up techniques combine, with what reason others do not, and how packages add theirs."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from vivace.errors import (
    IncompatibleTechniques,
    InvalidOption,
    UnknownTechnique,
    UserError,
    VivaceError,
)
from vivace.plan import Plan, ResolvedPlan, resolve
from vivace.registry import Seam
from vivace.types import Change, Exactness, Need

MODULE = """\
from dataclasses import dataclass

from vivace.registry import Technique, TechniqueInfo
from vivace.types import Change, Exactness, Need

INFO = TechniqueInfo("made up for a test")


@dataclass(frozen=True)
class Config:
    pass


class MadeUp(Technique):
    exactness = Exactness({exactness!r})
    needs = frozenset(map(Need, {needs!r}))
    changes = frozenset(map(Change, {changes!r}))
"""

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a technique into a seam of the package `made_up`, which can be imported meanwhile."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(
        seam: str,
        name: str,
        exactness: Exactness = Exactness.EXACT,
        needs: tuple[Need, ...] = (),
        changes: tuple[Change, ...] = (),
    ) -> None:
        folder = tmp_path / "made_up" / seam
        folder.mkdir(parents=True, exist_ok=True)
        for package in (folder.parent, folder):
            (package / "__init__.py").touch()
        text = MODULE.format(
            exactness=str(exactness), needs=list(map(str, needs)), changes=list(map(str, changes))
        )
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()

    yield add
    for module in [name for name in sys.modules if name.split(".")[0] == "made_up"]:
        del sys.modules[module]


def planned(**choices: str | list[str]) -> ResolvedPlan:
    seams = {seam: Seam(f"made_up.{seam}") for seam in choices}
    return resolve(Plan.from_dict(choices), seams)


# What one technique needs that another takes away: these pairs are refused, and no others.
CONFLICTS = {
    (Need.ALL_ROWS, Change.ROWS),
    (Need.ALL_ROWS, Change.EXPERTS),
    (Need.ATTENTION_SUMS, Change.ATTENTION_MATH),
    (Need.ATTENTION_SUMS, Change.READ_SET),
    (Need.KEYS, Change.KV_MERGE),
    (Need.WHOLE_PROMPT, Change.PROMPT),
    (Need.ALIGNED_CHUNKS, Change.ORDER),
}


def test_what_one_needs_another_may_not_change(write: Write) -> None:
    for need in Need:
        write("pickers", need.name.lower(), needs=(need,))
    for change in Change:
        write("movers", change.name.lower(), changes=(change,))
    for need, change in itertools.product(Need, Change):
        choices = {"pickers": need.name.lower(), "movers": change.name.lower()}
        for given in (choices, dict(reversed(choices.items()))):
            if (need, change) not in CONFLICTS:
                planned(**given)
                continue
            with pytest.raises(IncompatibleTechniques) as caught:
                planned(**given)
            assert caught.value.first == f"pickers.{need.name.lower()}"
            assert caught.value.second == f"movers.{change.name.lower()}"
            assert caught.value.reason in str(caught.value)


@pytest.mark.parametrize("change", Change)
def test_some_things_only_one_technique_may_change(change: Change, write: Write) -> None:
    for name in ("one", "two"):
        write("movers", name, changes=(change,))
    is_exclusive = change in {
        Change.ACCEPT,
        Change.ATTENTION_MATH,
        Change.KV_BYTES,
        Change.PROMPT,
    }
    if not is_exclusive:
        assert len(planned(movers=["one", "two"]).techniques["movers"]) == 2
        return
    with pytest.raises(IncompatibleTechniques, match=f"both change {change}"):
        planned(movers=["one", "two"])


@pytest.mark.parametrize("change", [Change.ORDER, Change.RESIDENCY, Change.STEP_TOKENS])
def test_what_must_never_cost_quality(change: Change, write: Write) -> None:
    write("movers", "honest", Exactness.DISTRIBUTION, changes=(change,))
    write("movers", "careless", Exactness.LOSSY, changes=(change,))
    planned(movers="honest")
    with pytest.raises(IncompatibleTechniques, match=f"it is lossy and changes {change}"):
        planned(movers="careless")


@pytest.mark.parametrize("seam", ["weight_formats", "kv_stores", "schedulers", "decoders"])
def test_one_technique_at_a_time_in_a_seam_that_does_not_stack(seam: str, write: Write) -> None:
    for name in ("one", "two"):
        write(seam, name)
    assert planned(**{seam: "two"}).one(seam).name == "two"
    with pytest.raises(UserError, match=rf"\[{seam}\] takes one technique, not 2"):
        planned(**{seam: ["one", "two"]})


BODY = ("int2", {"group_size": 64, "symmetric": False})
HEAD = ("int4", {"role": "head"})


@pytest.mark.parametrize(
    ("given", "choices"),
    [
        ("int2", [("int2", {})]),
        ("int2:group_size=64,symmetric=false", [BODY]),
        ("int2:group_size=64,symmetric=false,head=int4", [BODY, HEAD]),
        (" int2 : group_size = 64 , symmetric = false , head = int4 ", [BODY, HEAD]),
        (["int2:group_size=64,symmetric=false", "head=int4"], [BODY, HEAD]),
        (({"name": "int2", "group_size": 64, "symmetric": False}, "head=int4"), [BODY, HEAD]),
        ({"name": "int4", "role": "head"}, [HEAD]),
        ("head=int4:group_size=row", [("int4", {"role": "head", "group_size": "row"})]),
    ],
)
def test_choices_are_texts_tables_or_lists(given: Any, choices: list[Any]) -> None:
    assert Plan.of(weight_formats=given).choices["weight_formats"] == tuple(choices)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "int2,",
        "int2,hat=int4",
        "int2=int4",
        "head=",
        "head=:a=1",
        "int2,head=a=b",
        "head=int4,int2",
    ],
)
def test_texts_that_are_no_choices_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match="expected NAME or NAME:OPTION=VALUE"):
        Plan.of(weight_formats=text)
    with pytest.raises(InvalidOption, match="expected NAME or NAME:OPTION=VALUE"):
        Plan.of(kv_stores="bfloat16,head=float32")  # a seam without roles


@pytest.mark.parametrize("given", [7, None, [None], {"group_size": 64}, {"name": 3}])
def test_what_names_no_technique_is_refused(given: Any) -> None:
    with pytest.raises(InvalidOption, match=r"\[weight_formats\] is .*expected the name of a"):
        Plan.of(weight_formats=given)


def test_a_plan_is_as_exact_as_its_worst_part(write: Write) -> None:
    for exactness in Exactness:
        write("movers", str(exactness), exactness)
        write("pickers", str(exactness), exactness)
    assert list(Exactness) == [Exactness.EXACT, Exactness.DISTRIBUTION, Exactness.LOSSY]
    for one in Exactness:
        for two in Exactness:
            worst = max(one, two, key=list(Exactness).index)
            assert planned(movers=str(one), pickers=str(two)).exactness is worst


# ---------------------------------------------------------------- entry points


Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Make other packages' entry points visible in the group `made_up.movers`."""

    def add(**modules: str) -> None:
        every = EntryPoints(
            EntryPoint(name, module, "made_up.movers") for name, module in modules.items()
        )
        monkeypatch.setattr(importlib.metadata, "entry_points", every.select)

    return add


def test_another_package_adds_a_technique(write: Write, register: Register) -> None:
    write("movers", "shipped")
    write("elsewhere", "foreign", changes=(Change.ROWS,))
    register(foreign="made_up.elsewhere.foreign")
    seam = Seam("made_up.movers")
    assert seam.names() == ["foreign", "shipped"]
    foreign = planned(movers="foreign").one("movers")
    assert (foreign.name, foreign.changes) == ("foreign", {Change.ROWS})
    with pytest.raises(UnknownTechnique, match="did you mean foreign"):
        seam.create("foreing")


def test_a_shipped_technique_is_never_shadowed(write: Write, register: Register) -> None:
    write("movers", "shipped")
    write("elsewhere", "shipped", Exactness.LOSSY)
    register(shipped="made_up.elsewhere.shipped")
    seam = Seam("made_up.movers")
    assert seam.names() == ["shipped"]
    assert seam.load("shipped").__name__ == "made_up.movers.shipped"
    assert seam.create("shipped").exactness is Exactness.EXACT


def test_a_technique_that_cannot_be_imported_says_why(
    write: Write, register: Register, tmp_path: Path
) -> None:
    write("movers", "shipped")
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    register(broken="broken", missing="no_such_module")
    seam = Seam("made_up.movers")
    assert seam.names() == ["broken", "missing", "shipped"]  # listing imports nothing
    with pytest.raises(VivaceError, match="'broken' failed to import: division by") as caught:
        seam.load("broken")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(VivaceError, match="'missing' failed to import: No module") as caught:
        seam.load("missing")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
