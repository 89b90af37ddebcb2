"""Where models are found: shipped names, directories, the hub's cache; never the network here."""

from __future__ import annotations

import fnmatch
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from checkpoints import reference_model, save
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoSibling
from tokenizers_in_code import KINDS
from tokenizers_in_code import save as save_tokenizer

from vivace.errors import BadFile, ModelNotFound
from vivace.models import hub, location
from vivace.models.gguf.files import gguf_models, select
from vivace.models.loading import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The hub's library has changed its transport between versions.
HTTP = vars(hub_errors)["Response"].__module__.partition(".")[0]


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


class Repository:
    """`org/name` on a hub that downloads into the cache; the cache itself is read for real."""

    def __init__(self, cache: Path) -> None:
        self.files: list[str] = []
        self.downloaded: list[str] = []  # by the last call
        self.repo = cache / "models--org--name"
        self.snapshot = self.repo / "snapshots" / COMMIT

    def model_info(self, name: str, *, revision: str | None) -> SimpleNamespace:
        assert (name, revision) in {("org/name", None), ("org/name", "v2")}
        return SimpleNamespace(siblings=[RepoSibling(file) for file in self.files])

    def snapshot_download(self, name, *, revision, allow_patterns, local_files_only=False):
        if local_files_only:
            return snapshot_download(
                name, revision=revision, allow_patterns=allow_patterns, local_files_only=True
            )
        self.downloaded = [
            file for file in self.files if any(fnmatch.fnmatch(file, p) for p in allow_patterns)
        ]
        for file in self.downloaded:
            (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (self.snapshot / file).write_bytes(b"GGUF")
        (self.repo / "refs").mkdir(parents=True, exist_ok=True)
        (self.repo / "refs" / (revision or "main")).write_text(COMMIT)
        return str(self.snapshot)


@pytest.fixture
def repository(cache, monkeypatch) -> Repository:
    fake = Repository(cache)
    monkeypatch.setattr(HfApi, "model_info", staticmethod(fake.model_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


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

    def pull(name: str, revision: str | None, quantization: str | None) -> Path:
        assert (name, revision, quantization) == ("org/small", None, None)
        shard.write_bytes(data)
        return cached

    monkeypatch.setattr(hub, "pull", pull)
    assert load_model("org/small").path == cached


def test_what_is_not_here_says_what_to_do(cache):
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        load_model("org/absent")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        location.resolve("org/absent:Q4_K_M")
    with pytest.raises(ModelNotFound, match="not a hub name: expected org/name"):
        location.resolve("org/double--dash")  # refused by the hub's library
    with pytest.raises(ModelNotFound, match="org/name"):
        hub.pull("no name")


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
    http = importlib.import_module(HTTP)

    def refuse(*_args, **_options):
        response = http.Response(status, request=http.Request("GET", "https://hub.invalid"))
        raise error("line one\nline two", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFound, match=message) as caught:
        hub.pull("org/name")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told(cache, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Exception, match="No space left"):
        hub.pull("org/name")


@pytest.mark.parametrize("error", ["ConnectError", "ReadTimeout"])
def test_the_hub_cannot_be_reached(cache, monkeypatch, error):
    """The transport's own errors, which the hub's library lets through when it lists files."""

    def fail(*_args, **_options):
        raise getattr(importlib.import_module(HTTP), error)("no route\nto the hub")

    monkeypatch.setattr(HfApi, "model_info", fail)
    for quantization in (None, "Q4_K_M"):
        with pytest.raises(ModelNotFound, match="hub cannot be reached") as caught:
            hub.pull("org/name", None, quantization)
        assert "\n" not in str(caught.value)


def test_offline_what_the_cache_has_is_pulled(cached):
    assert hub.pull("org/small") == cached
    next(cached.glob("model-00002*")).unlink()
    assert hub.pull("org/small") == cached  # loading names what is missing
    touch(cached, "small-Q8_0.gguf")
    assert hub.pull("org/small", None, "Q8_0") == cached / "small-Q8_0.gguf"
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        hub.pull("org/small", None, "Q4_K_M")


def test_only_weights_and_texts_are_fetched(repository):
    """No pickle and no code is ever asked for, and no GGUF where there are safetensors."""
    wanted = {"config.json", "a.safetensors", "chat_template.jinja", "tokenizer.json"}
    others = {"pytorch_model.bin", "modeling_own.py", "model-Q4_K_M.gguf", "training_args.bin"}
    repository.files = [*wanted, *others]
    assert hub.pull("org/name") == repository.snapshot
    assert set(repository.downloaded) == wanted


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


# ---------------------------------------------------------------- GGUF


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"GGUF")


def test_a_gguf_file_is_itself_the_model(tmp_path, monkeypatch):
    names = ("a.gguf", "B.GGUF", "c-00002-of-00003.gguf")
    touch(tmp_path, *names)
    for name in names:
        assert location.resolve(tmp_path / name) == tmp_path / name
    monkeypatch.chdir(tmp_path)
    assert location.resolve("a.gguf") == Path("a.gguf")
    with pytest.raises(ModelNotFound, match=r"is not here.*\.gguf file"):
        location.resolve("absent.gguf")


def test_a_directory_of_one_gguf_model_is_that_model(tmp_path):
    touch(tmp_path, "a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "mmproj-F16.gguf", "notes")
    assert location.resolve(tmp_path) == tmp_path / "a-00001-of-00002.gguf"
    touch(tmp_path, "config.json")  # which GGUF repositories may hold, too
    assert location.resolve(tmp_path) == tmp_path / "a-00001-of-00002.gguf"
    touch(tmp_path, "b.gguf")
    with pytest.raises(ModelNotFound, match=r"has 2 GGUF .* one of a-00001-of-00002\.gguf, b\."):
        location.resolve(tmp_path)
    touch(tmp_path, "model.safetensors")
    assert location.resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("file", "quantization"),
    [
        ("small-1.5B-Q4_K_M.gguf", "Q4_K_M"),
        ("small.Q4_K_S.gguf", "Q4_K_S"),
        ("small_q8_0.gguf", "Q8_0"),
        ("Q2_K.gguf", "Q2_K"),
        ("small-UD-Q3_K_XL.gguf", "Q3_K_XL"),
        ("small-IQ2_XXS.gguf", "IQ2_XXS"),
        ("small-IQ4_NL.gguf", "IQ4_NL"),
        ("small-i1-IQ4_XS.gguf", "IQ4_XS"),
        ("small-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("small-TQ1_0.gguf", "TQ1_0"),
        ("small-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("small-bf16.gguf", "BF16"),
        ("small-fp16.gguf", "FP16"),
        ("small-f16-q6_k.gguf", "Q6_K"),
        ("small-Q5_K_M_v2.gguf", "Q5_K_M"),
        ("BF16/small-00001-of-00003.gguf", "BF16"),
        ("QwQ-32B.gguf", ""),
        ("small-2024Q4.gguf", ""),
    ],
)
def test_quantizations_are_told_by_names(file, quantization):
    [model] = gguf_models([file])
    assert model.quantization == quantization
    if quantization:
        assert select([model], quantization.lower()) == [model]


def test_a_quantization_is_not_cut_short():
    models = gguf_models(["a-IQ4_XS.gguf", "a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a-UD-Q4_K_M.gguf"])
    for wanted in ("Q4", "Q4_K", "K_M", "Q4_XS", "4_K_M", "a", "UD", "Q4_K_", "Q4.K.M", ""):
        assert select(models, wanted) == []
    assert [model.name for model in select(models, "Q4_K_M")] == ["a-Q4_K_M", "a-UD-Q4_K_M"]
    assert [model.name for model in select(models, "ud-q4_k_m")] == ["a-UD-Q4_K_M"]
    assert [model.name for model in select(models, "A-Q4_K_S.gguf")] == ["a-Q4_K_S"]


FILES = [
    *("README.md", "config.json", "imatrix.gguf", "mmproj-small-Q8_0.gguf"),
    *("small-Q2_K.gguf", "small-Q4_K_M.gguf", "small-Q4_K_S.gguf", "small-IQ4_XS.gguf"),
    *("Q8_0/small-Q8_0-00001-of-00002.gguf", "Q8_0/small-Q8_0-00002-of-00002.gguf"),
    *("F16/small-00001-of-00002.gguf", "F16/small-00002-of-00002.gguf", "old[1].gguf"),
]


@pytest.mark.parametrize(
    ("wanted", "downloaded"),
    [
        ("", ["small-Q4_K_M.gguf"]),
        (":Q4_K_M", ["small-Q4_K_M.gguf"]),
        (":iq4_xs", ["small-IQ4_XS.gguf"]),
        ("@v2:Q2_K", ["small-Q2_K.gguf"]),
        (":q8_0", FILES[8:10]),
        (":f16", FILES[10:12]),
        (":small-Q4_K_S.gguf", ["small-Q4_K_S.gguf"]),
        (":small-Q8_0-00002-of-00002.gguf", FILES[8:10]),
        (":Q8_0/small-Q8_0-00001-of-00002.gguf", FILES[8:10]),
        (":old[1].gguf", ["old[1].gguf"]),
    ],
)
def test_a_quantization_of_the_hub_is_fetched_once(repository, wanted, downloaded):
    repository.files = FILES
    path = location.resolve(f"org/name{wanted}")
    assert path == repository.snapshot / downloaded[0]
    assert path.exists()
    assert repository.downloaded == downloaded
    repository.files = []  # now from the cache
    assert location.resolve(f"org/name{wanted}") == path


@pytest.mark.parametrize(
    ("files", "wanted", "message"),
    [
        (FILES, ":Q5_K_M", r"'Q5_K_M': there are F16, Q8_0, old\[1\]\.gguf, IQ4_XS, Q2_K, Q4_K_M,"),
        (FILES, ":Q4_K", "no GGUF model 'Q4_K'"),
        (FILES, ":mmproj-small-Q8_0.gguf", "no GGUF model 'mmproj"),
        (["a.safetensors", "config.json"], ":Q4_K_M", "there are none"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], ":Q4_K_M", r"2 GGUF .* a-Q4_K_M\.gguf, b-Q4_K_M\."),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "", r"one of a-Q4_K_M\.gguf, b-Q4_K_M\.gguf"),
        (["a-Q2_K.gguf", "a-Q8_0.gguf"], "", "say org/name:QUANT with one of Q2_K, Q8_0"),
        (["a-Q8_0-00002-of-00002.gguf"], "", "only 1 of the 2 parts"),
    ],
)
def test_what_a_repository_has_is_listed(repository, files, wanted, message):
    repository.files = files
    with pytest.raises(ModelNotFound, match=message):
        location.resolve(f"org/name{wanted}")
    assert repository.downloaded == []


def test_the_only_gguf_model_needs_no_quantization(repository):
    repository.files = ["a-Q8_0.gguf", "mmproj-F16.gguf", "pytorch_model.bin"]
    assert location.resolve("org/name") == repository.snapshot / "a-Q8_0.gguf"
    assert repository.downloaded == ["a-Q8_0.gguf"]


def test_an_interrupted_download_of_a_split_goes_on(repository):
    repository.files = FILES
    path = location.resolve("org/name:Q8_0")
    missing = repository.snapshot / FILES[9]
    missing.unlink()
    missing.symlink_to(repository.repo / "blobs" / "gone")
    missing.with_name("dangling").symlink_to(missing)
    assert "org/name:Q8_0" not in [item.name for item in location.list_local()]
    missing.unlink()
    repository.downloaded = []
    assert location.resolve("org/name:Q8_0") == path
    assert FILES[9] in repository.downloaded
    assert missing.exists()


def test_gguf_models_of_the_cache_are_listed(repository):
    touch(repository.snapshot, *FILES[:-1], "a-Q6_K.gguf", "b-Q6_K.gguf", "c-00001-of-00002.gguf")
    (repository.repo / "refs").mkdir()
    (repository.repo / "refs" / "main").write_text(COMMIT)
    found = {item.name: item for item in location.list_local() if item.origin == "hub"}
    quantizations = {"F16", "IQ4_XS", "Q2_K", "Q4_K_M", "Q4_K_S", "Q8_0"}
    names = {f"org/name:{name}" for name in (*quantizations, "a-Q6_K.gguf", "b-Q6_K.gguf")}
    assert set(found) == names
    assert found["org/name:Q8_0"].num_bytes == 2 * len(b"GGUF")
    for name, item in found.items():
        assert location.resolve(name) == item.path


def test_a_model_that_is_not_whole_is_not_listed(cached):
    assert "org/small" in [item.name for item in location.list_local()]
    next(cached.glob("model-00002*")).unlink()
    assert "org/small" not in [item.name for item in location.list_local()]
    (cached / "model.safetensors.index.json").write_text("{")
    assert "org/small" not in [item.name for item in location.list_local()]
