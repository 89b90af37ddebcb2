"""Checkpoints that others quantized: each layout against weights worked out one by one."""

from __future__ import annotations

import base64
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import checkpoint, random_tokens, run_logits
from quantized_files import (
    Quantized,
    awq,
    float4,
    float8,
    float_weights,
    gptq,
    group_config,
    int8,
    int_weights,
    kind,
    packed,
    quantize_checkpoint,
    read_tensors,
    write_tensors,
)

from vivace import LLM, SamplingParams
from vivace.errors import UnsupportedModel
from vivace.executors.native import NativeExecutor
from vivace.executors.torch_ import TorchExecutor
from vivace.models.config import Config
from vivace.models.formats.safetensors import SafetensorsFile
from vivace.models.gguf.export import export_gguf
from vivace.models.loading import Weights, load_model
from vivace.models.quantized.parts import Parts
from vivace.models.quantized.tensors import read_method
from vivace.registry import Seam

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "quantized.json").read_text())
FORMATS = Seam("vivace.techniques.weight_formats")
pytestmark = pytest.mark.usefixtures("own_surroundings")


def method(**fields: Any) -> Any:
    return read_method(Config({"quantization_config": fields}))


def matrix_of(made: Quantized, path: Path, **fields: Any) -> Any:
    """What is read of one matrix in a file."""
    file = path / "one.safetensors"
    write_tensors(file, {f"m.{name}": tensor for name, tensor in made.tensors.items()})
    source = Weights([SafetensorsFile(file)])
    shape = made.weight.shape
    return method(**fields).matrix(Parts(source, "m", frozenset(made.tensors), shape))


def assert_means(matrix: Any, made: Quantized) -> None:
    """The same bits in one piece and cut, and where a kernel reads the codes."""
    np.testing.assert_array_equal(np.asarray(matrix), made.weight, strict=True)
    cut = matrix[8:40][3:]
    assert cut.shape == (len(made.weight[8:40][3:]), made.weight.shape[1])
    np.testing.assert_array_equal(np.asarray(cut), made.weight[11:40], strict=True)


def pack(matrix: Any) -> Any:
    """The matrix as `stored` packs it, of the size that it said before."""
    stored = FORMATS.create("stored")
    packed = stored.pack(matrix)
    assert packed.num_bytes == stored.num_bytes(matrix)
    return packed, stored.dequant(packed)


GPTQ, AWQ = kind("gptq")[0], kind("awq")[0]
SHAPES = [(64, 96), (32, 256), (96, 160)]


# ---------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, version: int, shape: tuple[int, int], tmp_path: Path) -> None:
    made = gptq(shape, bits=bits, version=version)
    name = "gptq" if version == 1 else "gptq_v2"
    matrix = matrix_of(made, tmp_path, **GPTQ | {"bits": bits, "checkpoint_format": name})
    assert_means(matrix, made)
    packed, weight = pack(matrix)
    assert packed.kernel == f"int{bits}/32/float16/zeros"
    np.testing.assert_array_equal(weight, made.weight, strict=True)


def test_gptq_by_hand(tmp_path: Path) -> None:
    """Eight inputs of the output 0 are the hexadecimal digits of a word from the right."""
    words = np.zeros((4, 8), np.int32)
    words[0] = 0x76543210
    words[:, 1] = np.uint32(0xFFFFFFFF).view(np.int32)
    zeros = np.array([[0x7777_77F7]], np.uint32).view(np.int32)  # of the output 1: 15 + 1 is 0
    scales = np.full((1, 8), 0.5, np.float16)
    tensors = {"qweight": words, "qzeros": zeros, "scales": scales}
    made = Quantized(tensors, np.zeros((8, 32), np.float32))
    weight = np.asarray(matrix_of(made, tmp_path, **GPTQ))
    np.testing.assert_array_equal(weight[0, :8], (np.arange(8) - 8) * 0.5)
    assert set(weight[1]) == {15 * 0.5}


@pytest.mark.parametrize(
    ("group", "kernel"),
    [(-1, "row"), (256, "row"), (512, "row"), (128, "128"), (64, "64"), (96, "32"), (192, "64")],
)
def test_groups_of_any_size_that_kernels_can_share(group, kernel, tmp_path):
    made = gptq((32, 256), group=group if group < 512 else -1)
    matrix = matrix_of(made, tmp_path, **GPTQ | {"group_size": group})
    assert_means(matrix, made)
    packed, weight = pack(matrix)
    assert packed.kernel == f"int4/{kernel}/float16/zeros"
    np.testing.assert_array_equal(weight, made.weight, strict=True)


def test_symmetric_codes_store_no_zeros(tmp_path):
    made = gptq((64, 96), is_symmetric=True, scale_type=ml_dtypes.bfloat16)
    matrix = matrix_of(made, tmp_path, **GPTQ | {"sym": True})
    assert_means(matrix, made)
    assert pack(matrix)[0].kernel == "int4/32/bfloat16"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("version", "said"), [(1, "gptq_v2"), (2, "gptq"), (1, "gptq")])
def test_symmetric_files_of_the_wrong_label(version, said, bits, tmp_path, caplog):
    made = gptq((64, 96), bits=bits, version=version, is_symmetric=True)
    matrix = matrix_of(
        made, tmp_path, **GPTQ | {"bits": bits, "sym": True, "checkpoint_format": said}
    )
    assert_means(matrix, made)
    meant = "gptq" if version == 1 else "gptq_v2"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said != meant)
    assert all(f"of the format {meant}" in line and f"it says {said}" in line for line in lines)


def test_one_line_for_all_matrices_of_the_wrong_label(tmp_path, caplog):
    reader = method(**GPTQ | {"sym": True})
    made = gptq((64, 96), version=2, is_symmetric=True)
    write_tensors(tmp_path / "f", {f"m.{name}": t for name, t in made.tensors.items()})
    source = Weights([SafetensorsFile(tmp_path / "f")])
    for _ in range(3):
        reader.matrix(Parts(source, "m", frozenset(made.tensors), (64, 96)))
    assert len(caplog.records) == 1


def test_asymmetric_files_are_what_they_say(tmp_path, caplog):
    made = gptq((64, 96), is_symmetric=True, version=1)
    matrix = matrix_of(made, tmp_path, **GPTQ | {"checkpoint_format": "gptq_v2"})
    assert np.asarray(matrix)[0, 0] == made.weight[0, 0] + made.tensors["scales"][0, 0]
    assert not caplog.records


def test_scattered_groups_are_decoded(tmp_path, caplog):
    made = gptq((64, 96), is_scattered=True)
    matrix = matrix_of(made, tmp_path, **GPTQ | {"desc_act": True})
    assert_means(matrix, made)
    packed, weight = pack(matrix)
    assert packed.kernel == "float16_float32"
    np.testing.assert_array_equal(weight, made.weight.astype(np.float16).astype(np.float32))
    assert "act-order" in caplog.text


def test_groups_without_a_kernel_are_decoded_and_said_once(tmp_path, caplog):
    made = gptq((64, 96), group=16)
    matrix = matrix_of(made, tmp_path, **GPTQ | {"group_size": 16})
    assert_means(matrix, made)
    stored = FORMATS.create("stored")
    for _ in range(3):
        assert stored.pack(matrix).kernel == "float16_float32"
    (record,) = caplog.records
    assert "int4 in groups of 16" in record.getMessage()


# ---------------------------------------------------------------- AWQ


@pytest.mark.parametrize("group", [32, 64, -1])
def test_awq(group: int, tmp_path: Path) -> None:
    made = awq((64, 128), group=group)
    matrix = matrix_of(made, tmp_path, **AWQ | {"group_size": group, "version": "GEMM"})
    assert_means(matrix, made)
    packed, weight = pack(matrix)
    assert packed.kernel == f"int4/{'row' if group == -1 else group}/float16/zeros"
    np.testing.assert_array_equal(weight, made.weight, strict=True)


def test_awq_by_hand(tmp_path: Path) -> None:
    """The digits of a word from the right are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    words = np.full((32, 1), 0x75316420, np.int32)
    tensors = {
        "qweight": words,
        "qzeros": np.full((1, 1), 0x11111111, np.int32),
        "scales": np.full((1, 8), 2, np.float16),
    }
    made = Quantized(tensors, np.zeros((8, 32), np.float32))
    weight = np.asarray(matrix_of(made, tmp_path, **AWQ))
    np.testing.assert_array_equal(weight[:, 5], 2.0 * (np.arange(8) - 1))


# ---------------------------------------------------------------- compressed-tensors


@pytest.mark.parametrize("shape", [(64, 96), (40, 96)])
@pytest.mark.parametrize(("is_symmetric", "are_zeros_packed"), [(1, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed(bits, group, is_symmetric, are_zeros_packed, shape, tmp_path):
    made = packed(
        shape,
        bits=bits,
        group=group,
        is_symmetric=bool(is_symmetric),
        are_zeros_packed=bool(are_zeros_packed),
    )
    weights = int_weights(bits, group, bool(is_symmetric))
    matrix = matrix_of(made, tmp_path, **group_config("pack-quantized", weights))
    assert_means(matrix, made)
    stored, weight = pack(matrix)
    zeros = "" if is_symmetric else "/zeros"
    assert stored.kernel == f"int{bits}/{'row' if group == -1 else group}/bfloat16{zeros}"
    np.testing.assert_array_equal(weight, made.weight, strict=True)


@pytest.mark.parametrize("bits", [1, 5, 6, 7])
def test_packed_bits_without_a_kernel(bits, tmp_path):
    made = packed((48, 96), bits=bits)
    matrix = matrix_of(made, tmp_path, **group_config("pack-quantized", int_weights(bits)))
    assert_means(matrix, made)
    assert pack(matrix)[0].kernel == "float16_float32"


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("is_per_tensor", [True, False])
def test_int8(is_symmetric, is_per_tensor, tmp_path):
    made = int8((48, 96), is_symmetric=is_symmetric, is_per_tensor=is_per_tensor)
    if is_per_tensor and not is_symmetric:
        zero = made.tensors["weight_zero_point"][:1, 0]
        made.tensors["weight_zero_point"] = zero
        numbers = made.tensors["weight"].astype(np.float32) - zero.astype(np.float32)
        made.weight = numbers * made.tensors["weight_scale"].astype(np.float32)
    weights = int_weights(8, -1, is_symmetric)
    weights |= {"strategy": "tensor"} if is_per_tensor else {}
    matrix = matrix_of(made, tmp_path, **group_config("int-quantized", weights))
    assert_means(matrix, made)
    stored, weight = pack(matrix)
    assert stored.kernel == "int8/row/bfloat16" + ("" if is_symmetric else "/zeros")
    np.testing.assert_array_equal(weight, made.weight, strict=True)


@pytest.mark.parametrize("is_per_tensor", [True, False])
def test_float8(is_per_tensor, tmp_path, caplog):
    made = float8((48, 96), is_per_tensor=is_per_tensor)
    weights = float_weights(8, strategy="tensor" if is_per_tensor else "channel")
    matrix = matrix_of(made, tmp_path, **group_config("float-quantized", weights))
    assert_means(matrix, made)
    assert pack(matrix)[0].kernel == "float16_float32"
    assert "no kernel reads float8" in caplog.text


@pytest.mark.parametrize("is_mx", [True, False])
def test_float4(is_mx, tmp_path):
    made = float4((48, 96), is_mx=is_mx)
    weights = float_weights(4, 32 if is_mx else 16, "group" if is_mx else "tensor_group")
    name = "mxfp4-pack-quantized" if is_mx else "nvfp4-pack-quantized"
    matrix = matrix_of(made, tmp_path, **group_config(name, weights))
    assert_means(matrix, made)
    assert pack(matrix)[0].kernel == "float16_float32"


def spelled(tensor: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, tensor["dtype"], tensor["dtype"]))
    return np.frombuffer(base64.b64decode(tensor["bytes"]), dtype).reshape(tensor["shape"])


@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_what_compressed_tensors_wrote(index: int, tmp_path: Path) -> None:
    """It decompresses to bfloat16; ours is what it rounds."""
    case = GOLDEN[index]
    tensors = {name: spelled(tensor) for name, tensor in case["tensors"].items()}
    made = Quantized(tensors, spelled(case["weight"]))
    matrix = matrix_of(made, tmp_path, **case["config"])
    rounded = np.asarray(matrix).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded.view(np.uint16), made.weight.view(np.uint16))


# ---------------------------------------------------------------- models


def mixed(shape: tuple[int, int], seed: int) -> Quantized:
    """A matrix of each of three kinds in turn."""
    kinds = (
        packed,
        int8,
        functools.partial(packed, bits=8, group=64, is_symmetric=False),
    )
    fitting = kinds[:2] if shape[1] % 64 else kinds
    return fitting[seed % len(fitting)](shape, seed=seed)


def mixed_config() -> dict[str, Any]:
    groups = {
        "group_0": ("pack-quantized", int_weights(4)),
        "group_1": ("int-quantized", int_weights(8, -1)),
        "group_2": ("pack-quantized", int_weights(8, 64, False)),
    }
    return group_config("mixed-precision", int_weights(4)) | {
        "config_groups": {
            name: {"targets": [f"re:.*{name}"], "weights": weights, "format": format}
            for name, (format, weights) in groups.items()
        }
    }


W8A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "gptq": ("llama", *kind("gptq")),
    "gptq, 3 bits, symmetric": (
        "qwen2", GPTQ | {"bits": 3, "sym": True}, functools.partial(gptq, bits=3, is_symmetric=True)
    ),
    "gptq, act-order": (
        "llama", GPTQ | {"desc_act": True}, functools.partial(gptq, is_scattered=True)
    ),
    "gptq, fused": ("phi3", *kind("gptq")),
    "gptq, experts": ("mixtral", *kind("gptq")),
    "awq": ("llama", *kind("awq")),
    "awq, experts": ("mixtral", *kind("awq")),
    "packed": ("llama", group_config("pack-quantized", int_weights(4)), packed),
    "packed, zeros": ("qwen3", *kind("packed")),
    "int8": ("llama", *kind("int8")),
    "float8": ("llama", *kind("float8")),
    "nvfp4": (
        "llama", group_config("nvfp4-pack-quantized", float_weights(4, 16, "tensor_group")), float4
    ),
    "mixed": ("llama", mixed_config(), mixed),
}  # fmt: skip
NOT_QUANTIZED = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "block_sparse_moe.gate")


def make(name: str, path: Path) -> dict[str, np.ndarray]:
    family, config, quantize = CHECKPOINTS[name]
    checkpoint(family, path)

    def is_chosen(tensor: str) -> bool:
        return not any(part in tensor for part in NOT_QUANTIZED)

    return quantize_checkpoint(path, config, quantize, is_chosen)


def dense_twin(path: Path, other: Path, weights: dict[str, np.ndarray]) -> Path:
    """The same model with its matrices decoded."""
    shutil.copytree(path, other)
    fields = json.loads((path / "config.json").read_text())
    del fields["quantization_config"]
    (other / "config.json").write_text(json.dumps(fields))
    modules = {name.removesuffix(".weight") for name in weights}
    kept = {
        name: array
        for name, array in read_tensors(path / "model.safetensors").items()
        if name.rpartition(".")[0] not in modules or name.endswith(".bias")
    }
    write_tensors(other / "model.safetensors", kept | weights)
    return other


def logits(path: Path, executor: Any, weight_format: str, **kwargs: Any) -> np.ndarray:
    model = load_model(path)
    kv_store = Seam("vivace.techniques.kv_stores").create("float32")
    made = executor(model.graph, model.weights, FORMATS.create(weight_format), kv_store, **kwargs)
    return run_logits(made, random_tokens(40), 40)


def assert_alike(native: np.ndarray, reference: np.ndarray) -> None:
    """Inputs are rounded alike: a tie that falls to the other side moves the rows behind it."""
    error = np.abs(native - reference).max(axis=1)
    assert (error < 2e-3).mean() > 0.3
    assert np.std(native - reference) < 0.1 * np.std(reference)
    assert error[0] < 2e-3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_model_computes_what_its_codes_mean(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    weights = make(name, path)
    assert len(weights) >= 12
    model = load_model(path)
    assert model.weight_format == {"name": "stored"}
    for tensor, weight in weights.items():
        np.testing.assert_array_equal(np.asarray(model.weights[tensor]), weight, strict=True)
    # Decoded it is the same model, to the bit.
    twin = dense_twin(path, tmp_path / "twin", weights)
    dense = logits(twin, NativeExecutor, "float32")
    np.testing.assert_array_equal(logits(path, NativeExecutor, "float32"), dense)
    native = logits(path, NativeExecutor, "stored")
    assert_alike(native, logits(path, TorchExecutor, "stored"))
    assert np.std(native - dense) < 0.2 * np.std(dense)


def test_it_answers(tmp_path: Path) -> None:
    path = tmp_path / "model"
    make("packed", path)
    llm = LLM(path)
    assert llm.plan.one("weight_formats").name == "stored"
    assert LLM.estimate(path).weight_bytes == llm.weight_bytes
    done = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert len(done.choices[0].token_ids) == 4
    # Units of 64 outputs: k and v have 32 of them, gate and up 96.
    body = 3 * (4 * 64 * 64 + 2 * 128 * 64 + 64 * 96) * (4 + 16 / 32) / 8
    assert llm.weight_bytes - 2 * 97 * 64 * 4 == body


def test_tensors_that_change_nothing_are_left_out(tmp_path, caplog):
    path = tmp_path / "model"
    make("int8", path)
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    group = fields["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = W8A8 | {"strategy": "tensor", "dynamic": False}
    (path / "config.json").write_text(json.dumps(fields))
    before = logits(path, NativeExecutor, "stored")
    tensors = read_tensors(path / "model.safetensors")
    one = np.ones(1, np.float32)
    attention = "model.layers.1.self_attn"
    tensors |= {f"{attention}.k_scale": one, f"{attention}.q_proj.input_scale": one}
    write_tensors(path / "model.safetensors", tensors)
    caplog.clear()
    np.testing.assert_array_equal(logits(path, NativeExecutor, "stored"), before)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for part in ("kv_cache_scheme is not used", "input_activations: not used", "2 tensors such as"):
        assert any(part in line for line in lines)


def test_biases_of_zero_are_left_out(tmp_path):
    path = tmp_path / "model"
    make("gptq", path)
    before = logits(path, NativeExecutor, "stored")
    tensors = read_tensors(path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float16)
    write_tensors(path / "model.safetensors", tensors)
    np.testing.assert_array_equal(logits(path, NativeExecutor, "stored"), before)


def test_a_quantized_head(tmp_path):
    path = tmp_path / "model"
    checkpoint("llama", path)
    quantize_checkpoint(path, GPTQ | {"lm_head": True}, _any_rows, lambda name: "lm_head" in name)
    assert_alike(logits(path, NativeExecutor, "stored"), logits(path, TorchExecutor, "stored"))


def _any_rows(shape: tuple[int, int], seed: int) -> Quantized:
    return gptq(shape, seed=seed)


def test_shards_may_divide_a_matrix(tmp_path):
    path = tmp_path / "model"
    make("gptq", path)
    before = logits(path, NativeExecutor, "stored")
    tensors = read_tensors(path / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        write_tensors(path / shard, {name: tensors[name] for name in members})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (path / "model.safetensors").unlink()
    np.testing.assert_array_equal(logits(path, NativeExecutor, "stored"), before)


def test_it_is_exported_decoded(tmp_path):
    path = tmp_path / "model"
    weights = make("packed", path)
    export_gguf(load_model(path), tmp_path / "out.gguf", None, None)
    exported = load_model(tmp_path / "out.gguf")
    down = np.asarray(exported.weights["blk.1.ffn_down.weight"])
    wanted = weights["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(down, wanted.astype(np.float16))


def test_matrices_stored_upside_down_are_refused(tmp_path):
    path = tmp_path / "model"
    checkpoint("gpt2", path)
    quantize_checkpoint(path, GPTQ, gptq, lambda name: "c_fc.weight" in name)
    with pytest.raises(UnsupportedModel, match=r"c_fc.weight' is quantized and stored as \(in"):
        load_model(path)
