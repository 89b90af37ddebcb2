"""A seam is a folder, a technique is a file in it: listed without importing, made by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import types
import typing
from abc import ABC
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vivace.errors import InvalidOption, UnknownOption, UnknownTechnique, VivaceError, nearest
from vivace.types import Change, Exactness, Need

__all__ = ["Maturity", "Seam", "Technique", "TechniqueInfo", "seams"]


class Maturity(StrEnum):
    STABLE = "stable"
    EXPERIMENTAL = "experimental"


@dataclass(frozen=True, slots=True)
class TechniqueInfo:
    """What a technique says of itself; `papers` are keys of docs/papers.toml."""

    summary: str
    papers: tuple[str, ...] = ()
    maturity: Maturity = Maturity.STABLE


class Technique(ABC):  # noqa: B024  the bases of the seams have abstract methods
    """The part that all techniques share. A module holds one subclass of its seam's base.

    The module also holds `Config`, a frozen dataclass of options, and `INFO`. The class is made as
    `cls(config)`; what else it needs it is given by the methods of its seam.
    """

    name: str = ""  # the file's stem, set by the seam

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def exactness(self) -> Exactness:
        return Exactness.EXACT

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    @property
    def changes(self) -> frozenset[Change]:
        return frozenset()

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)


class Seam:
    """The techniques of one folder, plus those that other packages register by entry point.

    `Seam("vivace.techniques.schedulers")` has the name `schedulers`; third parties use the entry
    point group of that same dotted name, with a module as the value.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.name = package.rpartition(".")[2]

    def _shipped(self) -> dict[str, str]:
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        names = (item.name for item in pkgutil.iter_modules(folders))
        return {n: f"{self.package}.{n}" for n in names if n != "base" and not n.startswith("_")}

    def _registered(self) -> dict[str, str]:
        found = importlib.metadata.entry_points(group=self.package)
        return {entry.name: entry.value for entry in found}

    def names(self) -> list[str]:
        """Names of all techniques, sorted; imports none of them."""
        return sorted(self._registered() | self._shipped())

    def load(self, name: str) -> types.ModuleType:
        """The module of a technique; a shipped one is never shadowed. Raises `UnknownTechnique`."""
        # Reading entry points takes tens of milliseconds: only for names that do not ship.
        module = self._shipped().get(name) or self._registered().get(name)
        if module is None:
            hint = nearest(name, self.names())
            raise UnknownTechnique(f"no {self.name} technique '{name}': {hint}")
        try:
            return importlib.import_module(module)
        except Exception as error:
            raise VivaceError(
                f"the {self.name} technique '{name}' failed to import: {error}"
            ) from error

    def info(self, name: str) -> TechniqueInfo:
        return self.load(name).INFO

    def create(self, name: str, **options: Any) -> Any:
        """A configured technique. Raises `UnknownTechnique`, `UnknownOption`, `InvalidOption`."""
        module = self.load(name)
        config = _configure(f"{self.name} technique '{name}'", module.Config, options)
        technique = _technique_class(module)(config)
        technique.name = name
        return technique


def _technique_class(module: types.ModuleType) -> type[Technique]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Technique)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise VivaceError(f"{module.__name__} must define one technique class, not {len(found)}")
    return found[0]


def _configure(owner: str, config_class: type, options: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(config_class)
    for key, value in options.items():
        if key not in hints:
            raise UnknownOption(f"{owner} has no option '{key}': {nearest(key, hints)}")
        if not _fits(value, hints[key]):
            raise InvalidOption(
                f"option '{key}' of {owner} is {value!r}: expected {_spell(hints[key])}"
            )
    return config_class(**options)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return any(type(value) is type(item) and value == item for item in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(item, inner) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return hint is Any or isinstance(value, origin or hint)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(item) for item in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_spell(typing.get_args(hint)[0])}"
    return getattr(hint, "__name__", None) or str(hint)


def seams() -> dict[str, Seam]:
    """Every seam there is, by name, read from the folders of `vivace.techniques`."""
    package = "vivace.techniques"
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = sorted(item.name for item in pkgutil.iter_modules(folders) if item.ispkg)
    return {name: Seam(f"{package}.{name}") for name in names}
