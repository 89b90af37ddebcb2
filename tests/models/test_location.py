"""Where models are found: shipped names, directories, the hub's cache; never the network here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from checkpoints import reference_model, save
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from tokenizers_in_code import KINDS
from tokenizers_in_code import save as save_tokenizer

from vivace.errors import BadFile, ModelNotFound, UnsupportedModel
from vivace.models import location
from vivace.models.loading import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, without a network."""
    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return path


@pytest.fixture
def cached(cache) -> Path:
    """A snapshot of `org/small` as the hub's library would leave it."""
    repo = cache / "models--org--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    model = reference_model("llama", {"vocab_size": 600})
    save_tokenizer(KINDS["byte level"](), snapshot)
    model.save_pretrained(snapshot, max_shard_size="60KB")
    return snapshot


def test_a_cached_model_is_run_from_its_snapshot(cached):
    model = load_model("org/small")
    assert model.path == cached
    assert model.tokenizer.encode("fox")
    assert load_model(f"org/small@{COMMIT}").path == cached


def test_an_interrupted_download_goes_on(cached, monkeypatch):
    """A snapshot that lacks a file is not used; the hub is asked for the rest."""
    shard = next(cached.glob("model-00002*"))
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(BadFile, match=r"shard .* is missing"):  # offline
        load_model("org/small")

    def pull(name: str, revision: str | None) -> Path:
        assert (name, revision) == ("org/small", None)
        shard.write_bytes(data)
        return cached

    monkeypatch.setattr(location, "pull", pull)
    assert load_model("org/small").path == cached


def test_what_is_not_here_says_what_to_do(cache):
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        load_model("org/absent")
    with pytest.raises(UnsupportedModel, match="GGUF"):
        load_model("org/small:Q4_K_M")
    with pytest.raises(ModelNotFound, match="org/name"):
        location.pull("no name")


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, hub_errors.RepositoryNotFoundError, "not on the hub"),
        (403, hub_errors.GatedRepoError, "accept its licence"),
        (404, hub_errors.RevisionNotFoundError, "not on the hub"),
        (500, hub_errors.HfHubHTTPError, "hub error"),
    ],
)
def test_the_hubs_refusals_are_explained(cache, monkeypatch, status, error, message):
    import huggingface_hub

    http = importlib.import_module(vars(hub_errors)["Response"].__module__.partition(".")[0])

    def refuse(*_args, **_options):
        response = http.Response(status, request=http.Request("GET", "https://hub.invalid"))
        raise error("line one\nline two", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFound, match=message) as caught:
        location.pull("org/name")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told(cache, monkeypatch):
    import huggingface_hub

    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Exception, match="No space left"):
        location.pull("org/name")


def test_only_weights_and_texts_are_fetched(cache, monkeypatch):
    """No pickle and no code is ever asked for."""
    import fnmatch

    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or "x"
    )
    location.pull("org/name")
    for name in ("pytorch_model.bin", "modeling_own.py", "model.gguf", "training_args.bin"):
        assert not any(fnmatch.fnmatch(name, item) for item in asked["allow_patterns"])
    for name in ("config.json", "a.safetensors", "chat_template.jinja", "tokenizer.json"):
        assert any(fnmatch.fnmatch(name, item) for item in asked["allow_patterns"])


def test_shipped_models_come_first(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert location.resolve("tiny") == location.shipped()["tiny"]
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load_model("./tiny")
    found = {item.name: item for item in location.list_local()}
    assert found["tiny"].origin == "shipped"
    assert found["org/small"].origin == "hub"
    assert found["org/small"].path == cached
    assert found["org/small"].num_bytes > 10_000


def test_no_cache_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "absent"))
    assert [item.name for item in location.list_local()] == ["tiny"]


def test_a_directory_of_org_slash_name_is_a_directory(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(reference_model("llama", {}), tmp_path / "org" / "here")
    assert load_model("org/here").path.samefile(path)
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
