"""Named ways to damage a quantized checkpoint; each has a fragment of the error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bad_files import LAYER, make_good
from quantized_files import int_weights, kind, quantize_checkpoint, read_tensors, write_tensors

Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]
GROUP = 8  # divides rows of 16 and 24 weights
METHODS = ("gptq", "awq", "packed", "int8", "float8")
# name: (method, fragment of the error, change of the config, change of the tensors)
CASES: dict[str, tuple[str, str, Callable[[Fields], Any], Callable[[Tensors], Any]]] = {}


def make_quantized(path: Path, method: str) -> None:
    """A checkpoint that loads and runs."""
    make_good(path)
    quantize_checkpoint(path, *kind(method, GROUP))


def damage(path: Path, name: str) -> None:
    _, _, change_config, change_tensors = CASES[name]
    fields = json.loads((path / "config.json").read_text())
    change_config(fields["quantization_config"])
    (path / "config.json").write_text(json.dumps(fields))
    tensors = read_tensors(path / "model.safetensors")
    change_tensors(tensors)
    write_tensors(path / "model.safetensors", tensors)


def nothing(_: Any) -> None:
    pass


def config_case(method: str, name: str, expected: str, **changes: Any) -> None:
    """Fields of the config changed; `...` removes one."""

    def change(fields: Fields) -> None:
        for field, value in changes.items():
            fields.pop(field, None)
            if value is not ...:
                fields[field] = value

    CASES[f"{method}: {name}"] = method, expected, change, nothing


def scheme_case(
    method: str, name: str, expected: str, part: str = "weights", **changes: Any
) -> None:
    """Fields of the group changed, those of its weights by default."""

    def change(fields: Fields) -> None:
        group = fields["config_groups"]["group_0"]
        (group if part == "group" else group[part]).update(changes)

    CASES[f"{method}: {name}"] = method, expected, change, nothing


def tensor_case(method: str, name: str, expected: str, part: str, change: Any) -> None:
    """One tensor of a matrix replaced; None removes it."""

    def change_tensors(tensors: Tensors) -> None:
        full = f"{LAYER}.mlp.up_proj.{part}"
        changed = change(tensors.pop(full)) if full in tensors else change(None)
        if changed is not None:
            tensors[full] = changed

    CASES[f"{method}: {name}"] = method, expected, nothing, change_tensors


def gone(_: Any) -> None:
    return None


def filled(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.full(array.shape, value, array.dtype)


def as_type(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.astype(dtype)


def without_last(array: np.ndarray) -> np.ndarray:
    return array[:-1]


def transposed(array: np.ndarray) -> np.ndarray:
    return array.T


# ---------------------------------------------------------------- the method

for other in (
    "bitsandbytes", "hqq", "aqlm", "fp8", "fbgemm_fp8", "torchao", "quanto", "eetq", "auto-round",
    "vptq", "spqr", "higgs", "bitnet", "mxfp4", "quark", "exl3", "modelopt", "",
):  # fmt: skip
    config_case("gptq", f"method '{other}'", f"quant_method '{other}' is not", quant_method=other)
config_case("gptq", "method a number", "'quant_method' is 4: expected a string", quant_method=4)
config_case("gptq", "no method", "'quant_method' is missing", quant_method=...)

# ---------------------------------------------------------------- GPTQ

for value in (0, -4, 5, 16, "4", 4.5, True, None, [4], 2**70):
    config_case("gptq", f"bits {value!r}", "'bits' is", bits=value)
for value in (0, -2, "8", 2**40, [8], True):
    config_case("gptq", f"group_size {value!r}", "'group_size' is", group_size=value)
config_case("gptq", "no group_size", "'group_size' is missing", group_size=...)
config_case("gptq", "sym a number", "'sym' is 1: expected true or false", sym=1)
config_case("gptq", "desc_act a string", "'desc_act' is 'no'", desc_act="no")
for value in ("marlin", "gptq_p", "bitblas", "GPTQ_V3", "exllama"):
    config_case(
        "gptq", f"format {value}", f"checkpoint_format '{value}' is not", checkpoint_format=value
    )
config_case("gptq", "format a number", "'checkpoint_format' is 2", checkpoint_format=2)
config_case("gptq", "planar format", "'gptq_p' is not supported", format="gptq_p")
config_case("gptq", "marlin", "is_marlin_format", is_marlin_format=True)
config_case("gptq", "words of 64 bits", "pack_dtype 'int64'", pack_dtype="int64")
config_case("gptq", "settings by module", "dynamic: it gives", dynamic={"+:.*up.*": {"bits": 8}})
config_case("gptq", "dynamic a list", "'dynamic' is", dynamic=["-:.*up.*"])
config_case("gptq", "the wrong bits", "has shape [2, 16]: expected [4, 16]", bits=8)
config_case("gptq", "the wrong group", "has shape [2, 2]: expected [1, 2]", group_size=16)
for part in ("qweight", "qzeros", "scales"):
    tensor_case("gptq", f"{part} missing", f"up_proj.{part}' is missing beside", part, gone)
    tensor_case("gptq", f"{part} cut short", "has shape", part, without_last)
    tensor_case("gptq", f"{part} transposed", "has shape", part, transposed)
    tensor_case("gptq", f"{part} of int64", "is stored as int64", part, as_type(np.int64))
tensor_case("gptq", "scales of int8", "stored as int8", "scales", as_type(np.int8))
tensor_case("gptq", "scales infinite", "NaN or infinite", "scales", filled(np.inf))
tensor_case("gptq", "scales NaN", "NaN or infinite", "scales", filled(np.nan))
tensor_case("gptq", "g_idx beyond", "has groups 2 to 2: expected 0 to 1", "g_idx", filled(2))
tensor_case("gptq", "g_idx negative", "has groups -1 to -1", "g_idx", filled(-1))
tensor_case("gptq", "g_idx of int64", "stored as int64", "g_idx", as_type(np.int64))
tensor_case("gptq", "g_idx cut short", "has shape [15]: expected [16]", "g_idx", without_last)
tensor_case("gptq", "a bias", "has no place", "bias", lambda _: np.ones(24, np.float16))


def only_names(first: str, then: str) -> Callable[[Tensors], None]:
    """A matrix under the names of another method."""

    def change(tensors: Tensors) -> None:
        module = f"{LAYER}.mlp.up_proj"
        for name in [name for name in tensors if name.startswith(module)]:
            tensors[name.replace(first, then)] = tensors.pop(name)
        for name in [n for n in tensors if n.startswith(module) and then not in n]:
            del tensors[name]

    return change


tensor_case("gptq", "stored twice", "weight' is there: expected none beside", "weight",
    lambda _: np.zeros((24, 16), np.float16))  # fmt: skip
CASES["gptq: g_idx missing, though reordered"] = (
    "gptq",
    "g_idx' is missing beside",
    lambda fields: fields.update(desc_act=True),
    lambda tensors: tensors.pop(f"{LAYER}.mlp.up_proj.g_idx"),
)
CASES["gptq: a matrix of another method"] = (
    "gptq", "stored as codes: expected weight, or g_idx", nothing, only_names("qweight", "codes")
)  # fmt: skip
CASES["gptq: all of a matrix missing"] = (
    "gptq", "up_proj.weight' is missing", nothing, only_names("nothing", "none at all")
)  # fmt: skip

# ---------------------------------------------------------------- AWQ

for value in (2, 3, 8, "4", None):
    config_case("awq", f"bits {value!r}", "'bits' is", bits=value)
for value in (0, -3, None, 1.5):
    config_case("awq", f"group_size {value!r}", "'group_size' is", group_size=value)
for value in ("gemv", "gemv_fast", "marlin", "llm-awq", "exllama", ""):
    config_case("awq", f"version {value!r}", f"version '{value}' is not", version=value)
config_case("awq", "version a number", "'version' is 1", version=1)
config_case("awq", "zero_point a number", "'zero_point' is 0", zero_point=0)
config_case("awq", "backend of llm-awq", "backend 'llm-awq' is not", backend="llm-awq")
config_case("awq", "a group that does not divide", "cannot be AWQ's", group_size=11)
for part in ("qweight", "qzeros", "scales"):
    tensor_case("awq", f"{part} missing", f"up_proj.{part}' is missing beside", part, gone)
    tensor_case("awq", f"{part} cut short", "has shape", part, without_last)
    tensor_case("awq", f"{part} of int8", "is stored as int8", part, as_type(np.int8))
tensor_case("awq", "scales infinite", "NaN or infinite", "scales", filled(-np.inf))

# ---------------------------------------------------------------- compressed-tensors

config_case("packed", "no groups", "'config_groups' is missing", config_groups=...)
config_case("packed", "groups empty", "'config_groups' is {}", config_groups={})
config_case("packed", "groups a list", "'config_groups' is", config_groups=[])
config_case("packed", "a preset", "'W4A16' names a preset", config_groups={"W4A16": ["Linear"]})
config_case("packed", "a group a string", "'g' is 'int4'", config_groups={"g": "int4"})
config_case("packed", "no format", "'format' is missing", format=...)
config_case("packed", "format a list", "'format' is", format=["pack-quantized"])
for value in ("marlin-24", "sparse-bitmask", "sparse-24-bitmask", "dense", "mxfp8-quantized", "x"):
    config_case("packed", f"format {value}", f"format '{value}' is not supported", format=value)
config_case("packed", "format of floats", "'type' is 'int'", format="float-quantized")
config_case(
    "packed", "sparsity", "sparsity_config", sparsity_config={"format": "sparse-24-bitmask"}
)
config_case("packed", "sparsity a list", "'sparsity_config' is", sparsity_config=["2:4"])
config_case(
    "packed", "rotations", "transform_config", transform_config={"config_groups": {"u": {}}}
)
config_case("packed", "cache scheme a list", "'kv_cache_scheme' is", kv_cache_scheme=[8])
config_case("packed", "status a number", "'quantization_status' is 3", quantization_status=3)
for value in (0, 9, 16, "4", 4.5, True):
    scheme_case("packed", f"num_bits {value!r}", "'num_bits' is", num_bits=value)
for value in (0, -2, None, "8", 2**40):
    scheme_case("packed", f"group_size {value!r}", "'group_size' is", group_size=value)
scheme_case("packed", "the wrong group", "has shape [16, 2]: expected [16, 4]", group_size=4)
scheme_case("packed", "a group that does not divide", "do not divide its rows", group_size=5)
scheme_case("packed", "the wrong bits", "has shape", num_bits=8)
scheme_case("packed", "type a number", "'type' is 1", type=1)
scheme_case("packed", "type of floats", "'type' is 'float'", type="float")
scheme_case("packed", "symmetric a string", "'symmetric' is 'yes'", symmetric="yes")
scheme_case("packed", "called symmetric", "is stored as int32|is not zero", symmetric=True)
scheme_case("packed", "dynamic weights", "'dynamic' is True", dynamic=True)
for value in ("group", "dynamic", True):
    scheme_case("packed", f"actorder {value!r}", "actorder 'group' is not", actorder=value)
scheme_case("packed", "actorder a number", "'actorder' is 7", actorder=7)
scheme_case("packed", "actorder a list", "'actorder' is", actorder=["group"])
for value in ("block", "token", "attn_head", "row"):
    scheme_case("packed", f"strategy {value}", f"strategy '{value}' is not", strategy=value)
scheme_case("packed", "strategy a number", "'strategy' is 2", strategy=2)
scheme_case("packed", "weights null", "'weights' is None", "group", weights=None)
scheme_case("packed", "targets missing", "'targets' is None", "group", targets=None)
scheme_case("packed", "targets numbers", "'targets' is [1]", "group", targets=[1])
scheme_case("packed", "outputs", "output_activations", "group", output_activations={"num_bits": 8})
scheme_case("packed", "inputs a string", "'input_activations' is", "group", input_activations="8")
for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
    tensor_case("packed", f"{part} missing", f"up_proj.{part}' is missing beside", part, gone)
    tensor_case("packed", f"{part} cut short", "has shape", part, without_last)
    tensor_case("packed", f"{part} of uint8", "is stored as uint8", part, as_type(np.uint8))
tensor_case("packed", "another shape", "weight_shape' says [24, 24]", "weight_shape", filled(24))
tensor_case("packed", "scales infinite", "NaN or infinite", "weight_scale", filled(np.inf))
tensor_case(
    "packed", "scattered groups", "weight_g_idx' is there", "weight_g_idx",
    lambda _: np.zeros(16, np.int32),
)  # fmt: skip
tensor_case("packed", "stored twice", "weight' is there: expected none beside", "weight",
    lambda _: np.zeros((24, 16), np.float16))  # fmt: skip
tensor_case("packed", "a scale of the matrix", "weight_global_scale' is there: expected none",
    "weight_global_scale", lambda _: np.ones(1, np.float32))  # fmt: skip
tensor_case("int8", "a shape", "weight_shape' is there: expected none", "weight_shape",
    lambda _: np.array([24, 16]))  # fmt: skip
tensor_case("float8", "zeros", "zero_point' is not zero: expected zeros", "weight_zero_point",
    lambda _: np.ones((24, 1), np.int8))  # fmt: skip
tensor_case("int8", "weight of uint8", "is stored as uint8", "weight", as_type(np.uint8))
tensor_case("int8", "weight_scale missing", "is missing beside weight:", "weight_scale", gone)
tensor_case("int8", "one scale", "has shape [1]: expected [24, 1]", "weight_scale", lambda s: s[0])
tensor_case("int8", "weight missing", "up_proj.weight' is missing", "weight", gone)
tensor_case("float8", "weight of int8", "is stored as int8", "weight", as_type(np.int8))
tensor_case("float8", "weight of NaN", "NaN or infinite", "weight", filled(np.nan))
tensor_case("float8", "weight_scale missing", "is missing beside weight:", "weight_scale", gone)
scheme_case("float8", "zero points", "'symmetric' is False", symmetric=False)
scheme_case("float8", "16 bits", "'num_bits' is 16", num_bits=16)
scheme_case("float8", "blocks", "strategy 'block' is not", strategy="block")
CASES["packed: groups that nothing fits"] = (
    "packed", "fit 0 of 2 config_groups",
    lambda fields: fields["config_groups"].update(
        group_0={"targets": ["Linear"], "weights": int_weights(8, GROUP)},
        group_1={"targets": ["Linear"], "weights": int_weights(2, GROUP)},
    ),
    nothing,
)  # fmt: skip
