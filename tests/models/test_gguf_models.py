"""A model written as GGUF and read back computes the same; what GGUF cannot say is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from checkpoints import checkpoint, make_executor, random_tokens, run_logits
from variants import VARIANTS

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.formats.gguf import GgufFile
from vivace.models.gguf.write import Storage, write_gguf
from vivace.models.loading import LoadedModel, load_model

NUM_TOKENS = 40
# Variants that a GGUF file of their architecture cannot describe, by what the refusal names.
REFUSALS = {
    "its blocks would be others": (
        *("llama, gelu", "llama, tanh gelu", "llama, relu", "qwen2, window above"),
        *("qwen2, layer types", "qwen3, window", "gemma2", "gemma2, no caps", "gemma2, biases"),
        *("gemma2, untied", "gemma2, layer types", "gemma3_text", "gemma3_text, linear"),
        *("gemma3_text, biases", "gpt2, untied", "gpt2, unscaled", "gpt2, scaled by layer"),
        *("smollm3", "smollm3, listed", "smollm3, windows", "smollm3, layer types"),
        *("qwen2_moe, normalised", "qwen2_moe, windows", "qwen3_moe", "olmoe, normalised"),
        *("phimoe", "phimoe, biases", "phimoe, window", "phimoe, longrope"),
    ),
    "its ropes would be others": ("llama, dynamic", "llama, yarn untruncated"),
    "its groups would be others": ("qwen2, window everywhere",),
    "no architecture for the family": ("gemma3", "mimo", "mimo, window"),
    r"no name for the tensor 'model\.layers\.3\.mlp\.linear_mlp\.weight'": (
        *("nemotron_nas", "nemotron_nas, biases", "nemotron_nas, llama3"),
    ),
    "feed_forward_length differs from layer to layer": (
        *("qwen2_moe, every second layer", "qwen2_moe, dense layers"),
        *("qwen3_moe, dense layers", "qwen3_moe, window"),
    ),
}
CANNOT_SAY = {variant: why for why, variants in REFUSALS.items() for variant in variants}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of variants, made once each."""
    made: dict[str, LoadedModel] = {}

    def get(variant: str) -> LoadedModel:
        if variant not in made:
            path = tmp_path_factory.mktemp("checkpoint")
            checkpoint(variant, path)
            made[variant] = load_model(path)
        return made[variant]

    return get


def write(model: LoadedModel, path, storage: Storage = Storage.F32) -> None:
    no_tokenizer = {"tokenizer.ggml.model": "none"}
    write_gguf(path, model.graph, model.weights, model.config, no_tokenizer, storage)


def logits(model: LoadedModel, executor: str = "native") -> np.ndarray:
    running = make_executor(executor, model.graph, model.weights)
    return run_logits(running, random_tokens(NUM_TOKENS), 7)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in CANNOT_SAY])
def test_what_is_written_is_read_as_the_same_model(variant, models, tmp_path):
    model = models(variant)
    write(model, tmp_path / "model.gguf")
    read = load_model(tmp_path / "model.gguf")
    np.testing.assert_allclose(logits(read), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", sorted(CANNOT_SAY))
def test_what_gguf_cannot_say_is_refused(variant, models, tmp_path):
    with pytest.raises(UnsupportedModel, match=CANNOT_SAY[variant]):
        write(models(variant), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("storage", "tolerance"), [(Storage.F16, 0.06), (Storage.BF16, 0.5), (Storage.Q8_0, 2.0)]
)
@pytest.mark.parametrize("variant", ["llama", "qwen2_moe", "phi3"])
def test_matrices_are_stored_as_asked(variant, storage, tolerance, models, tmp_path):
    write(models(variant), tmp_path / "model.gguf", storage)
    types = {
        name: info.type.name for name, info in GgufFile(tmp_path / "model.gguf").tensors.items()
    }
    assert types["blk.0.attn_output.weight"] == storage.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    if variant == "qwen2_moe":
        assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    read = load_model(tmp_path / "model.gguf")
    moved = np.abs(logits(read) - logits(models(variant))).max()
    assert 0 < moved < tolerance


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_quantized_files_run_with_their_own_weights(executor, models, tmp_path):
    """Blocks mean what the gguf package decodes them to, in every row of every matrix."""
    write(models("mixtral"), tmp_path / "blocks.gguf", Storage.Q8_0)
    read = load_model(tmp_path / "blocks.gguf")
    decoded = {name: np.array(read.weights[name]) for name in read.weights}
    for tensor in gguf.GGUFReader(tmp_path / "blocks.gguf").tensors:
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(decoded[tensor.name].ravel(), rows.ravel())
    expected = run_logits(make_executor(executor, read.graph, decoded), random_tokens(20), 7)
    running = make_executor(executor, read.graph, read.weights)
    assert np.array_equal(run_logits(running, random_tokens(20), 7), expected)


def rewritten(source, target, edit) -> None:
    """A file with its tensors edited: a dictionary of arrays by name."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for name, array in edit({t.name: np.array(t.data) for t in reader.tensors}).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fuse_attention(tensors):
    for layer in range(3):
        parts = [tensors.pop(f"blk.{layer}.attn_{part}.weight") for part in "qkv"]
        tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts)
    return tensors


def fuse_experts(tensors):
    for layer in range(3):
        parts = [tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
    return tensors


def separate_experts(tensors):
    """As files of the first mixtures have them."""
    for name in [name for name in tensors if "_exps" in name]:
        for index, expert in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps", f".{index}")] = expert
    return tensors


@pytest.mark.parametrize(
    ("variant", "edit"),
    [("llama", fuse_attention), ("mixtral", fuse_experts), ("mixtral", separate_experts)],
)
def test_other_ways_to_store_the_same(variant, edit, models, tmp_path):
    write(models(variant), tmp_path / "plain.gguf")
    rewritten(tmp_path / "plain.gguf", tmp_path / "other.gguf", edit)
    expected = logits(load_model(tmp_path / "plain.gguf"))
    assert np.array_equal(logits(load_model(tmp_path / "other.gguf")), expected)


def test_a_missing_and_an_unknown_tensor_are_named(models, tmp_path):
    write(models("llama"), tmp_path / "plain.gguf")

    def drop(tensors):
        del tensors["blk.1.ffn_up.weight"]
        return tensors

    rewritten(tmp_path / "plain.gguf", tmp_path / "less.gguf", drop)
    with pytest.raises(BadFile, match=r"'blk\.1\.ffn_up\.weight' is missing"):
        load_model(tmp_path / "less.gguf")
    more = {"blk.1.attn_sinks.weight": np.ones(4, np.float32)}
    rewritten(tmp_path / "plain.gguf", tmp_path / "more.gguf", lambda tensors: tensors | more)
    with pytest.raises(UnsupportedModel, match=r"'blk\.1\.attn_sinks\.weight' has no place"):
        load_model(tmp_path / "more.gguf")


def test_a_failed_write_leaves_what_was_there(models, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"mine")
    model = models("llama")
    weights = {name: model.weights[name] for name in model.weights}
    weights["model.layers.1.mlp.up_proj.weight"] = np.full((96, 64), 1e9, np.float32)
    with pytest.raises(UnsupportedModel, match="not finite as f16"):
        write_gguf(tmp_path / "model.gguf", model.graph, weights, model.config, {}, Storage.F16)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("model.gguf", b"mine")
    ]
