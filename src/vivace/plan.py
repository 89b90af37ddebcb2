"""A plan says which techniques run: a small TOML file, resolved once, refused with a reason."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vivace.blocks import Role
from vivace.errors import (
    BadFile,
    IncompatibleTechniques,
    InvalidOption,
    UnknownTechnique,
    UserError,
    nearest,
)
from vivace.registry import Seam, Technique, seams
from vivace.types import Change, Exactness, Need

__all__ = ["DEFAULTS", "Choices", "Plan", "ResolvedPlan", "parse_choices", "resolve"]

Choice = tuple[str, Mapping[str, Any]]  # a technique and its options
# How a seam's techniques are given: as text (see `parse_choices`), as a table as a plan has them,
# or as a list of both.
Choices = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]

# What runs where a plan is silent. Storage formats follow the checkpoint: see `LLM`.
DEFAULTS: dict[str, Choices] = {
    "weight_formats": "float32",
    "kv_stores": "float32",
    "schedulers": "chunked",
    "decoders": "autoregressive",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Names and options per seam; `measured` records where it was measured, as plain data."""

    choices: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(**choices: Choices) -> Plan:
        """`Plan.of(schedulers={"name": "chunked", "chunk_size": 64}, weight_formats="int4")`."""
        return Plan.from_dict(choices)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """A plan of `Choices` by seam. Raises `InvalidOption`."""
        seam_data = {seam: value for seam, value in data.items() if seam != "measured"}
        choices = {seam: _choices(seam, value) for seam, value in seam_data.items()}
        return Plan(choices, data.get("measured", {}))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan. Raises `BadFile` if it cannot be read, is not TOML or no plan."""
        try:
            return Plan.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except InvalidOption as error:
            raise BadFile(f"plan {path}: {error}") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadFile(
                f"plan {path}: {error}: expected a TOML file with a table per seam"
            ) from error

    def with_defaults(self, defaults: Mapping[str, Choices]) -> Plan:
        missing = {seam: _choices(seam, value) for seam, value in defaults.items()}
        return Plan(missing | dict(self.choices), self.measured)

    def spell(self, seam: str) -> str:
        """A seam's choices as text, to be read: see `parse_choices`."""
        ordered = sorted(self.choices[seam], key=lambda choice: "role" in choice[1])
        return ",".join(_spell(*choice) for choice in ordered)


def _choices(seam: str, given: Any) -> tuple[Choice, ...]:
    found: list[Choice] = []
    for item in given if isinstance(given, list | tuple) else [given]:
        if isinstance(item, str):
            found += parse_choices(item, _ROLES.get(seam, frozenset()))
        elif isinstance(item, Mapping) and isinstance(item.get("name"), str):
            options = {key: value for key, value in item.items() if key != "name"}
            found.append((item["name"], options))
        else:
            raise InvalidOption(
                f"[{seam}] is {item!r}: expected the name of a technique, or a table with name = "
                '"..." beside its options'
            )
    return tuple(found)


def parse_choices(text: str, roles: Collection[str] = ()) -> list[Choice]:
    """Techniques and their options as one text: `int4`, `int4:group_size=64,symmetric=false`.

    Where a seam has roles, techniques for some of them follow: `int2:group_size=64,head=int4`.
    Values of options are true, false, numbers or else texts. Raises `InvalidOption`.
    """
    starts = "|".join(roles)
    parts = re.split(rf",(?=\s*(?:{starts})\s*=)", text) if roles else [text]
    found: list[Choice] = []
    for part in parts:
        role, _, rest = (piece.strip() for piece in part.partition("="))
        name, options = _parse_choice(rest if role in roles else part, text)
        found.append((name, {"role": role, **options} if role in roles else options))
    return found


def _parse_choice(part: str, text: str) -> Choice:
    name, colon, rest = part.partition(":")
    options: dict[str, Any] = {}
    is_right = name.strip() and not set(name) & set(",=")
    for option in rest.split(",") if colon else ():
        key, sign, value = (piece.strip() for piece in option.partition("="))
        is_right = is_right and key and sign and value and key not in options
        options[key] = _value(value)
    if not is_right:
        raise InvalidOption(
            f"'{text}': expected NAME or NAME:OPTION=VALUE,..., each option once, such as "
            "int4:group_size=64,symmetric=false; others for some roles follow: int2,head=int4"
        )
    return name.strip(), options


def _spell(name: str, options: Mapping[str, Any]) -> str:
    own = {key: value for key, value in options.items() if key != "role"}
    role = f"{options['role']}=" if "role" in options else ""
    return role + name + ":" * bool(own) + ",".join(f"{k}={_text(v)}" for k, v in own.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """Configured techniques per seam, checked against one another."""

    techniques: Mapping[str, tuple[Technique, ...]]
    roles: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)

    def one(self, seam: str) -> Any:
        """The technique of a seam that holds exactly one, apart from those for some roles."""
        roles = self.roles.get(seam, (None,) * len(self.techniques[seam]))
        (technique,) = (
            made for made, role in zip(self.techniques[seam], roles, strict=True) if role is None
        )
        return technique

    def by_role(self, seam: str) -> dict[str, Any]:
        """Techniques of a seam that stand in for its one technique where a role is concerned."""
        pairs = zip(self.techniques[seam], self.roles.get(seam, ()), strict=False)
        return {role: technique for technique, role in pairs if role is not None}

    @property
    def exactness(self) -> Exactness:
        """A plan is as exact as its worst part."""
        return max((t.exactness for t in self._all()), key=lambda e: e.rank)

    def _all(self) -> Iterable[Technique]:
        return itertools.chain.from_iterable(self.techniques.values())


# Seams where one technique runs at a time; others stack.
_SINGLE = frozenset({"weight_formats", "kv_stores", "schedulers", "decoders"})

# Parts of a model for which a seam may have a technique of their own: `role = "head"`.
_ROLES = {"weight_formats": frozenset(Role) - {Role.BODY}}

# What one technique needs that another takes away.
_CONFLICTS: tuple[tuple[Need, Change, str], ...] = (
    (Need.ALL_ROWS, Change.ROWS, "it must see every row, and the other skips rows"),
    (Need.ALL_ROWS, Change.EXPERTS, "it must see every row's experts, and the other skips some"),
    (Need.ATTENTION_SUMS, Change.ATTENTION_MATH, "the other attends without softmax weights"),
    (Need.ATTENTION_SUMS, Change.READ_SET, "the other reads only some entries"),
    (Need.KEYS, Change.KV_MERGE, "the other merges the keys it reads"),
    (Need.WHOLE_PROMPT, Change.PROMPT, "it needs the whole prompt, and the other rewrites it"),
    (Need.ALIGNED_CHUNKS, Change.ORDER, "it needs aligned chunks, and the other reorders rows"),
)
# What must never cost quality.
_NEVER_LOSSY = frozenset({Change.ORDER, Change.RESIDENCY, Change.STEP_TOKENS})
# What two techniques may not both change.
_EXCLUSIVE = frozenset({Change.ACCEPT, Change.ATTENTION_MATH, Change.KV_BYTES, Change.PROMPT})


def resolve(plan: Plan, available: Mapping[str, Seam] | None = None) -> ResolvedPlan:
    """Make and check a plan's techniques.

    Raises `UnknownTechnique`, `UnknownOption`, `InvalidOption`, `IncompatibleTechniques`.
    """
    available = seams() if available is None else available
    made: dict[str, tuple[Technique, ...]] = {}
    roles: dict[str, tuple[str | None, ...]] = {}
    for seam, choices in plan.choices.items():
        if seam not in available:
            raise UnknownTechnique(f"plan: no seam '{seam}': {nearest(seam, available)}")
        roles[seam], own = _split_roles(seam, choices)
        num_general = roles[seam].count(None)
        if seam in _SINGLE and num_general != 1:
            apart = " apart from those for some roles" if len(own) > num_general else ""
            raise UserError(f"plan: [{seam}] takes one technique{apart}, not {num_general}")
        made[seam] = tuple(available[seam].create(name, **options) for name, options in own)
    labelled = [(f"{s}.{t.name}", t) for s, items in made.items() for t in items]
    for label, technique in labelled:
        for change in sorted(technique.changes & _NEVER_LOSSY):
            if technique.exactness is Exactness.LOSSY:
                raise IncompatibleTechniques(
                    label, "any plan", f"it is lossy and changes {change}, which must not be"
                )
    for (label_a, a), (label_b, b) in itertools.combinations(labelled, 2):
        _check_pair(label_a, a, label_b, b)
        _check_pair(label_b, b, label_a, a)
        for change in sorted(a.changes & b.changes & _EXCLUSIVE):
            raise IncompatibleTechniques(label_a, label_b, f"both change {change}")
    return ResolvedPlan(made, roles)


def _split_roles(
    seam: str, choices: tuple[Choice, ...]
) -> tuple[tuple[str | None, ...], Sequence[Choice]]:
    """The role of each choice, None where it has none, and the choices without it."""
    known = _ROLES.get(seam, frozenset())
    if not known:
        return (None,) * len(choices), list(choices)
    roles = tuple(options.get("role") for _, options in choices)
    for role in roles:
        if role is not None and role not in known:
            raise InvalidOption(
                f"plan: [{seam}] has no role {role!r}: expected one of {', '.join(sorted(known))}"
            )
        if role is not None and roles.count(role) > 1:
            raise UserError(f"plan: [{seam}] names the role '{role}' twice")
    own = [
        (name, {key: value for key, value in options.items() if key != "role"})
        for name, options in choices
    ]
    return roles, own


def _check_pair(needing: str, a: Technique, changing: str, b: Technique) -> None:
    for need, change, reason in _CONFLICTS:
        if need in a.needs and change in b.changes:
            raise IncompatibleTechniques(needing, changing, reason)
