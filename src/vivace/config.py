"""Every setting there is, and where its value came from: flag, environment, plan or file, default.

This table is the one place that names a setting. From it come the options of the command line, the
variables `VIVACE_*` and the keys of `vivace.toml`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vivace.errors import BadFile, InvalidOption, UnknownOption, nearest

__all__ = [
    "SAMPLING",
    "SETTINGS",
    "Kind",
    "Setting",
    "Settings",
    "Value",
    "config_files",
    "resolve",
]

FILE_NAME = "vivace.toml"


class Kind(StrEnum):
    """What a setting holds; the value is what help and errors call it."""

    INTEGER = "a whole number"
    NUMBER = "a number"
    TEXT = "text"
    SWITCH = "true or false"
    TEXTS = "texts"
    INTEGERS = "whole numbers"
    BIASES = "token ids with biases, such as 12:-100"

    @property
    def is_list(self) -> bool:
        return self in (Kind.TEXTS, Kind.INTEGERS, Kind.BIASES)


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    kind: Kind
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "VIVACE_" + self.name.upper()

    def parse(self, raw: Any, origin: str) -> Any:
        """The value of a text from a flag or variable, or of a TOML value.

        Raises `InvalidOption`.
        """
        try:
            value = _PARSERS[self.kind](raw)
        except (ValueError, TypeError):
            raise InvalidOption(
                f"{origin}: {self.name} is {_shorten(raw)}: expected {self.kind}"
            ) from None
        if self.choices and value not in self.choices:
            raise InvalidOption(
                f"{origin}: {self.name} is {_shorten(raw)}: expected {' or '.join(self.choices)}"
            )
        return value


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _integer(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise TypeError
    return int(raw)


def _number(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise TypeError
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError
    return value


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError
    return raw


def _switch(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    if not isinstance(raw, str) or raw.lower() not in words:
        raise ValueError
    return words[raw.lower()]


def _items(raw: Any) -> list[Any]:
    """A list from TOML or repeated flags; one text may hold a JSON list, else it is one item."""
    if isinstance(raw, str):
        raw = json.loads(raw) if raw.lstrip().startswith("[") else [raw]
    if not isinstance(raw, list | tuple):
        raise TypeError
    return list(raw)


def _biases(raw: Any) -> dict[int, float]:
    if isinstance(raw, str) and raw.lstrip().startswith("{"):
        raw = json.loads(raw)
    if isinstance(raw, Mapping):
        return {_integer(token): _number(bias) for token, bias in raw.items()}
    pairs = [_text(item).partition(":") for item in _items(raw)]
    return {_integer(token): _number(bias) for token, _, bias in pairs}


_PARSERS = {
    Kind.INTEGER: _integer,
    Kind.NUMBER: _number,
    Kind.TEXT: _text,
    Kind.SWITCH: _switch,
    Kind.TEXTS: lambda raw: tuple(_text(item) for item in _items(raw)),
    Kind.INTEGERS: lambda raw: tuple(_integer(item) for item in _items(raw)),
    Kind.BIASES: _biases,
}

# Names, kinds and defaults equal the fields of `types.SamplingParams`, which is not imported here
# because it needs numpy; a test holds the two together.
_SAMPLING = (
    Setting(
        "temperature",
        Kind.NUMBER,
        1.0,
        "randomness; 0 always takes the likeliest token",
    ),
    Setting("top_k", Kind.INTEGER, 0, "draw among the k likeliest tokens; 0: all"),
    Setting("top_p", Kind.NUMBER, 1.0, "draw among the likeliest tokens that hold this mass"),
    Setting("min_p", Kind.NUMBER, 0.0, "drop tokens below this share of the likeliest one"),
    Setting("typical_p", Kind.NUMBER, 1.0, "draw among the most typical tokens of this mass"),
    Setting("repetition_penalty", Kind.NUMBER, 1.0, "above 1 makes seen tokens less likely"),
    Setting(
        "presence_penalty",
        Kind.NUMBER,
        0.0,
        "subtracted from logits of tokens in the answer",
    ),
    Setting(
        "frequency_penalty",
        Kind.NUMBER,
        0.0,
        "the same, for each time a token occurred",
    ),
    Setting("logit_bias", Kind.BIASES, {}, "added to a token's logit, as id:bias"),
    Setting(
        "seed",
        Kind.INTEGER,
        None,
        "the same seed gives the same answer; unset: a fresh one",
    ),
    Setting("max_tokens", Kind.INTEGER, 256, "longest answer"),
    Setting("min_tokens", Kind.INTEGER, 0, "shortest answer"),
    Setting("stop", Kind.TEXTS, (), "end the answer before this text"),
    Setting("stop_token_ids", Kind.INTEGERS, (), "end the answer at this token"),
    Setting("ignore_eos", Kind.SWITCH, False, "go on after the model's end token"),
    Setting("include_stop", Kind.SWITCH, False, "keep the text that ended the answer"),
    Setting(
        "logprobs",
        Kind.INTEGER,
        None,
        "alternatives listed per generated token, 0 to 20",
    ),
    Setting(
        "prompt_logprobs",
        Kind.INTEGER,
        None,
        "alternatives listed per token of the prompt",
    ),
    Setting("n", Kind.INTEGER, 1, "number of answers"),
)
_OTHERS = (
    Setting(
        "model", Kind.TEXT, "tiny", "directory, GGUF file, org/name on the hub, or a shipped name"
    ),
    Setting("plan", Kind.TEXT, None, "TOML file that chooses techniques"),
    Setting(
        "weights",
        Kind.TEXT,
        None,
        "how weights are stored: a weight_formats technique, as NAME or NAME:OPTION=VALUE,...; "
        "others for head, embedding or router follow: int2,head=int4",
    ),
    Setting(
        "weight_cache",
        Kind.TEXT,
        None,
        "folder that keeps packed weights for the next start, or off; unset: the user's cache",
    ),
    Setting("kv", Kind.TEXT, None, "how keys and values are stored: a kv_stores technique"),
    Setting("threads", Kind.INTEGER, None, "threads; unset: what this process may use"),
    Setting(
        "isa",
        Kind.TEXT,
        None,
        "instruction set of the kernels; unset: the best there is",
        choices=("generic", "avx2", "avx512", "avx512vnni", "avx512bf16"),
    ),
    Setting(
        "tokenization",
        Kind.TEXT,
        "merges",
        "how text becomes tokens: as trained, the longest first, or the fewest",
        choices=("merges", "greedy", "shortest"),
    ),
    Setting("context", Kind.INTEGER, None, "tokens of a sequence; unset: the model's, to 8,192"),
    Setting("system", Kind.TEXT, None, "system message of a chat"),
    Setting(
        "raw",
        Kind.SWITCH,
        False,
        "give the prompt to the model without a chat template",
    ),
    Setting(
        "at_full_context",
        Kind.TEXT,
        "stop",
        "in a chat whose context is full: stop, or drop the oldest turns",
        choices=("stop", "drop-oldest"),
    ),
    Setting(
        "estimate",
        Kind.SWITCH,
        False,
        "print the memory that is needed, and load nothing",
    ),
    Setting("stride", Kind.INTEGER, None, "tokens between windows; unset: a whole window"),
    Setting("measure", Kind.SWITCH, False, "measure read bandwidth and peak arithmetic"),
    Setting("origin", Kind.SWITCH, False, "say where each value came from"),
    Setting("verbose", Kind.SWITCH, False, "print timing to stderr"),
    Setting("json", Kind.SWITCH, False, "print JSON for programs"),
    Setting("debug", Kind.SWITCH, False, "print tracebacks"),
)

SAMPLING: tuple[str, ...] = tuple(setting.name for setting in _SAMPLING)
SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in (*_OTHERS, *_SAMPLING)}

# Settings that name a technique of a seam, and so can come from a plan.
_SEAMS = {"weights": "weight_formats", "kv": "kv_stores"}


@dataclass(frozen=True, slots=True)
class Value:
    value: Any
    origin: str  # "flag --threads", "environment VIVACE_THREADS", "plan p.toml", "file ...", ...


class Settings(Mapping[str, Any]):
    """Resolved values by name; `origins` says where each came from."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def origin(self, name: str) -> str:
        return self._values[name].origin

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """The values of those names that somebody chose."""
        return {name: self[name] for name in names if self.origin(name) != "default"}


def resolve(
    flags: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    files: Sequence[Path] | None = None,
) -> Settings:
    """Settle every setting: a flag beats the environment, that a plan, that a file, that defaults.

    Of several files the first that has a key wins. Raises `UnknownOption` for a key or variable
    that is no setting, `InvalidOption` for a value that does not parse, `BadFile`.
    """
    environment = os.environ if environment is None else environment
    layers = [_from_flags(flags), _from_environment(environment)]
    of_files = [_from_file(path) for path in (config_files() if files is None else files)]
    named = _first("plan", [*layers, *of_files])
    if named is not None and named.value is not None:
        layers.append(_from_plan(Path(named.value)))
    layers += of_files
    layers.append({name: Value(setting.default, "default") for name, setting in SETTINGS.items()})
    merged: dict[str, Value] = {}
    for layer in reversed(layers):
        merged |= layer
    return Settings(merged)


def _first(name: str, layers: Iterable[Mapping[str, Value]]) -> Value | None:
    return next((layer[name] for layer in layers if name in layer), None)


def _from_flags(flags: Mapping[str, Any]) -> dict[str, Value]:
    found = {}
    for name, raw in flags.items():
        origin = f"flag {SETTINGS[name].flag}"
        found[name] = Value(SETTINGS[name].parse(raw, origin), origin)
    return found


def _from_environment(environment: Mapping[str, str]) -> dict[str, Value]:
    names = {setting.variable: setting for setting in SETTINGS.values()}
    found = {}
    for variable, raw in environment.items():
        if not variable.startswith("VIVACE_"):
            continue
        if variable not in names:
            raise UnknownOption(
                f"environment variable {variable} is no setting: {nearest(variable, names)}"
            )
        setting = names[variable]
        origin = f"environment {variable}"
        found[setting.name] = Value(setting.parse(raw, origin), origin)
    return found


def _from_file(path: Path) -> dict[str, Value]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadFile(f"{path}: {error}: expected a TOML file of settings") from error
    found = {}
    for key, raw in data.items():
        if key not in SETTINGS:
            raise UnknownOption(f"{path} has no setting '{key}': {nearest(key, SETTINGS)}")
        value = SETTINGS[key].parse(raw, f"file {path}")
        if key == "plan":  # a path in a file is relative to that file
            value = str(path.parent / value)
        found[key] = Value(value, f"file {path}")
    return found


def _from_plan(path: Path) -> dict[str, Value]:
    from vivace.plan import Plan  # needs numpy, which most commands do without

    plan = Plan.load(path)
    return {
        name: Value(plan.spell(seam), f"plan {path}")
        for name, seam in _SEAMS.items()
        if plan.choices.get(seam)
    }


def config_files() -> list[Path]:
    """The files that are read, the most important first: working directory, platform folder."""
    places = (Path(FILE_NAME), _platform_folder() / FILE_NAME)
    return [path for path in places if path.is_file()]


def _platform_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Preferences" / "vivace"
    variable = "APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME"
    root = os.environ.get(variable)
    return (Path(root) if root else Path.home() / ".config") / "vivace"
