"""Settings: which source wins, where a value came from, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vivace.config import SAMPLING, SETTINGS, Kind, resolve
from vivace.errors import BadFile, InvalidOption, UnknownOption
from vivace.types import SamplingParams


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_each_source_beats_the_next(tmp_path: Path) -> None:
    plan = write(tmp_path / "fast.toml", '[kv_stores]\nname = "bfloat16"\n')
    file = write(tmp_path / "vivace.toml", 'plan = "fast.toml"\nkv = "float32"\nthreads = 3\n')
    flags = {"threads": "5"}
    environment = {"VIVACE_THREADS": "4", "VIVACE_KV": "float32", "HOME": "/"}

    everything = resolve(flags, environment, [file])
    assert (everything["threads"], everything.origin("threads")) == (
        5,
        "flag --threads",
    )
    assert (everything["kv"], everything.origin("kv")) == (
        "float32",
        "environment VIVACE_KV",
    )

    no_flags = resolve({}, {"VIVACE_THREADS": "4"}, [file])
    assert no_flags.origin("threads") == "environment VIVACE_THREADS"
    assert (no_flags["kv"], no_flags.origin("kv")) == ("bfloat16", f"plan {plan}")

    only_file = resolve({}, {}, [file])
    assert (only_file["threads"], only_file.origin("threads")) == (3, f"file {file}")

    nothing = resolve({}, {}, [])
    assert (nothing["threads"], nothing.origin("threads")) == (None, "default")


def test_a_plan_is_shown_with_options_and_roles(tmp_path: Path) -> None:
    text = (
        '[[weight_formats]]\nname = "int4"\nrole = "head"\n'
        '[[weight_formats]]\nname = "int2"\ngroup_size = 64\nsymmetric = false\n'
    )
    settings = resolve({"plan": str(write(tmp_path / "p.toml", text))}, {}, [])
    assert settings["weights"] == "int2:group_size=64,symmetric=false,head=int4"


@pytest.mark.parametrize("text", ["weight_formats = 7", "[[kv_stores]]\nfast = true", "[kv_stores"])
def test_a_plan_that_is_none_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.toml", text)
    with pytest.raises(BadFile, match=r"plan .*p\.toml: .*expected"):
        resolve({"plan": str(path)}, {}, [])


def test_the_first_file_wins(tmp_path: Path) -> None:
    near = write(tmp_path / "near.toml", "threads = 1\n")
    far = write(tmp_path / "far.toml", "threads = 2\ncontext = 64\n")
    settings = resolve({}, {}, [near, far])
    assert (settings["threads"], settings["context"]) == (1, 64)


def test_given_holds_what_somebody_chose() -> None:
    settings = resolve({"temperature": "0", "seed": "7"}, {}, [])
    assert settings.given(SAMPLING) == {"temperature": 0.0, "seed": 7}


def test_sampling_settings_equal_the_fields_of_sampling_params() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SAMPLING) == fields
    assert SamplingParams(**{name: SETTINGS[name].default for name in SAMPLING}) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("threads", "2", 2),
        ("temperature", "1e-1", 0.1),
        ("temperature", 1, 1.0),
        ("raw", "yes", True),
        ("raw", "off", False),
        ("stop", "\n", ("\n",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop_token_ids", ["3", "4"], (3, 4)),
        ("logit_bias", ["12:-100", "7:1.5"], {12: -100.0, 7: 1.5}),
        ("logit_bias", '{"12": -100}', {12: -100.0}),
        ("logit_bias", {"12": 1}, {12: 1.0}),
    ],
)
def test_parse(name: str, raw: object, value: object) -> None:
    assert SETTINGS[name].parse(raw, "test") == value


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("threads", "two"),
        ("threads", "1.5"),
        ("threads", 1.5),
        ("threads", True),
        ("temperature", "warm"),
        ("temperature", "nan"),
        ("temperature", float("inf")),
        ("temperature", "1e999"),
        ("raw", "maybe"),
        ("raw", 1),
        ("system", 5),
        ("stop", 5),
        ("stop", [5]),
        ("stop", "[1"),
        ("stop_token_ids", "a"),
        ("logit_bias", ["12"]),
        ("logit_bias", ["a:1"]),
        ("logit_bias", [3]),
        ("at_full_context", "forget"),
        ("seed", "9" * 5000),
    ],
)
def test_what_does_not_parse_is_refused_with_its_origin(name: str, raw: object) -> None:
    with pytest.raises(InvalidOption, match=rf"^file x: {name} is .*: expected ") as caught:
        SETTINGS[name].parse(raw, "file x")
    assert len(str(caught.value)) < 200


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "vivace.toml", "thread = 2\n")
    with pytest.raises(UnknownOption, match=r"no setting 'thread': did you mean threads"):
        resolve({}, {}, [file])
    with pytest.raises(
        UnknownOption, match=r"VIVACE_TOPK is no setting: did you mean VIVACE_TOP_K"
    ):
        resolve({}, {"VIVACE_TOPK": "4"}, [])


@pytest.mark.parametrize("content", [b"threads = ", b"\xff\xfe", b"[threads", b"a = 1\na = 2"])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "vivace.toml"
    file.write_bytes(content)
    with pytest.raises(BadFile, match=r"vivace\.toml: "):
        resolve({}, {}, [file])


def test_every_setting_is_explained() -> None:
    for setting in SETTINGS.values():
        assert setting.help
        assert setting.flag.startswith("--")
        assert setting.variable.isupper()
        assert setting.kind in Kind
