"""Named ways to damage a good checkpoint; each takes its directory and a fragment of the error."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (260, 16),
    f"{LAYER}.self_attn.q_proj.weight": (16, 16),
    f"{LAYER}.self_attn.k_proj.weight": (8, 16),
    f"{LAYER}.self_attn.v_proj.weight": (8, 16),
    f"{LAYER}.self_attn.o_proj.weight": (16, 16),
    f"{LAYER}.input_layernorm.weight": (16,),
    f"{LAYER}.post_attention_layernorm.weight": (16,),
    f"{LAYER}.mlp.gate_proj.weight": (24, 16),
    f"{LAYER}.mlp.up_proj.weight": (24, 16),
    f"{LAYER}.mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
}
Header = dict[str, Any]
Damage = Callable[[Path], None]
CASES: dict[str, tuple[str, Damage]] = {}


def good_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def make_good(path: Path) -> None:
    """A checkpoint that loads and runs."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_tensors(path / "model.safetensors", good_tensors())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(f"<|{name}|>") for name in ("begin", "end", "user", "x")]
    )
    backend.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------- writing files


def header_of(tensors: dict[str, np.ndarray]) -> tuple[Header, bytes]:
    header, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": {4: "F32", 2: "F16"}[array.itemsize],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def write_raw(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    length = len(header) if length is None else length
    file.write_bytes(struct.pack("<Q", length) + header + data)


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = header_of(tensors)
    write_raw(file, json.dumps(header).encode(), data)


def case(name: str, expected: str) -> Callable[[Damage], Damage]:
    """Register a damage; its error must hold `expected`."""

    def register(damage: Damage) -> Damage:
        assert name not in CASES
        CASES[name] = (expected, damage)
        return damage

    return register


# ---------------------------------------------------------------- safetensors


def weights(path: Path) -> Path:
    return path / "model.safetensors"


def edit_header(edit: Callable[[Header], Any], extra: bytes = b"") -> Damage:
    """Rewrite the header with `edit` applied, over the same data."""

    def damage(path: Path) -> None:
        header, data = header_of(good_tensors())
        edit(header)
        write_raw(weights(path), json.dumps(header).encode(), data + extra)

    return damage


def raw_header(header: bytes | Callable[[], bytes], length: int | None = None) -> Damage:
    def damage(path: Path) -> None:
        _, data = header_of(good_tensors())
        text = header if isinstance(header, bytes) else header()
        write_raw(weights(path), text, data, length)

    return damage


def edit_tensors(edit: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    def damage(path: Path) -> None:
        tensors = good_tensors()
        edit(tensors)
        write_tensors(weights(path), tensors)

    return damage


NORM = "model.norm.weight"
Q = f"{LAYER}.self_attn.q_proj.weight"
case("header length 0", "header length 0")(raw_header(b"{}", 0))
case("header length 2^63", "header length 9223372036854775808")(raw_header(b"{}", 2**63))
case("header length 2^64-1", "header length 18446744073709551615")(raw_header(b"{}", 2**64 - 1))
case("header past the end", "header length 99999")(raw_header(b"{}", 99999))
case("header not UTF-8", "not UTF-8")(raw_header(b'{"\xff\xfe": 1}'))
case("header not JSON", "not JSON")(raw_header(b"weights!"))
case("header a list", "expected a JSON object")(raw_header(b"[1, 2]"))
case("header a number", "expected a JSON object")(raw_header(b"7"))
case("header only spaces", "is empty")(raw_header(b"        "))
case("header with a repeated tensor", "appears twice")(raw_header(b'{"a": {}, "a": {}}'))
case("header 100k deep", "nested too deeply")(raw_header(b'{"a":' * 100_000))
case("header of 100k lists", "nested too deeply")(raw_header(b"[" * 100_000))
case("header of ten million lists", "JSON elements")(raw_header(lambda: b"[" + b"[]," * 10_000_000))
case("header with a number of 5000 digits", "not valid")(raw_header(b'{"a": ' + b"9" * 5000 + b"}"))
case("tensor not an object", "expected dtype, shape")(edit_header(lambda h: h.update({NORM: 5})))
case("tensor without a shape", "expected dtype, shape")(edit_header(lambda h: h[NORM].pop("shape")))
case("unknown dtype", "dtype 'F31' is unknown")(edit_header(lambda h: h[NORM].update(dtype="F31")))
case("dtype a list", "is unknown")(edit_header(lambda h: h[NORM].update(dtype=["F32"])))
case("negative size", "sizes of 0 or more")(edit_header(lambda h: h[NORM].update(shape=[-16])))
case("size a float", "sizes of 0 or more")(edit_header(lambda h: h[NORM].update(shape=[16.0])))
case("size true", "sizes of 0 or more")(edit_header(lambda h: h[NORM].update(shape=[True])))
case("a shape of 100 sizes", "at most 8 sizes")(
    edit_header(lambda h: h[NORM].update(shape=[1] * 100))
)
case("shape product overflows", "needs")(
    edit_header(lambda h: h[NORM].update(shape=[2**32, 2**32, 2**32]))
)
case("shape product wraps to the right size", "needs")(
    edit_header(lambda h: h[NORM].update(shape=[2**62 + 4, 4]))
)
case("shape disagrees with bytes", "needs 68 bytes")(
    edit_header(lambda h: h[NORM].update(shape=[17]))
)
case("offsets reversed", "expected a begin and an end")(
    edit_header(lambda h: h[NORM].update(data_offsets=h[NORM]["data_offsets"][::-1]))
)
case("offsets negative", "expected a begin and an end")(
    edit_header(lambda h: h[NORM].update(data_offsets=[-64, 0]))
)
case("three offsets", "expected a begin and an end")(
    edit_header(lambda h: h[NORM].update(data_offsets=[0, 64, 64]))
)
case("offsets overlap", "overlaps")(edit_header(lambda h: h[NORM].update(data_offsets=[0, 64])))
case("offsets leave a gap", "leaves a gap")(
    edit_header(
        lambda h: h[NORM].update(data_offsets=[n + 4 for n in h[NORM]["data_offsets"]]), b"gap!"
    )
)
case("offsets past the end", "leaves a gap")(
    edit_header(lambda h: h[NORM].update(data_offsets=[2**40, 2**40 + 64]))
)
case("bytes after the last tensor", "data appended")(edit_header(lambda h: None, b"more"))
case("name of a million letters", "characters")(
    edit_header(lambda h: h.update({"n" * 10**6: h.pop(NORM)}))
)
case("tensor missing", "'model.norm.weight' is missing")(edit_tensors(lambda t: t.pop(NORM)))
case("tensor of the wrong shape", "has shape [17]: the config expects [16]")(
    edit_tensors(lambda t: t.update({NORM: np.ones(17, np.float32)}))
)
case("tensor of too many dimensions", "has shape [16, 1]: the config expects [16]")(
    edit_tensors(lambda t: t.update({NORM: np.ones((16, 1), np.float32)}))
)
case("matrix transposed", "has shape [24, 16]: the config expects [16, 24]")(
    edit_tensors(
        lambda t: t.update({f"{LAYER}.mlp.down_proj.weight": t[f"{LAYER}.mlp.up_proj.weight"]})
    )
)
case("integer weights", "stored as int32")(edit_header(lambda h: h[NORM].update(dtype="I32")))
case("a bias that the config has not", "has no place")(
    edit_tensors(lambda t: t.update({Q.replace("weight", "bias"): np.ones(16, np.float32)}))
)
case("more layers than the config says", "has no place")(
    edit_tensors(
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.ones((24, 16), np.float32)})
    )
)
case("NaN weights", "NaN or infinite")(edit_tensors(lambda t: t[Q].__setitem__((3, 3), np.nan)))
case("infinite weights", "NaN or infinite")(
    edit_tensors(lambda t: t[Q].__setitem__((0, 0), np.inf))
)
case("infinite half weights", "NaN or infinite")(
    edit_tensors(lambda t: t.update({NORM: np.full(16, -np.inf, np.float16)}))
)


@case("file cut short", "leaves a gap after|cut short")
def _cut_short(path: Path) -> None:
    weights(path).write_bytes(weights(path).read_bytes()[:-100])


@case("file cut inside the header", "does not fit")
def _cut_header(path: Path) -> None:
    weights(path).write_bytes(weights(path).read_bytes()[:200])


@case("file empty", "too few")
def _empty_weights(path: Path) -> None:
    weights(path).write_bytes(b"")


@case("file of 8 bytes", "too few")
def _eight_bytes(path: Path) -> None:
    weights(path).write_bytes(bytes(8))


@case("a directory for the weights", "not a file")
def _directory_weights(path: Path) -> None:
    weights(path).unlink()
    weights(path).mkdir()


@case("a pipe for the weights", "not a file")
def _pipe_weights(path: Path) -> None:
    weights(path).unlink()
    os.mkfifo(weights(path))


@case("a text file for the weights", "does not fit")
def _text_weights(path: Path) -> None:
    weights(path).write_text("<html>Too many requests</html>" * 10)


@case("100k tensors that are not used", "has no place")
def _many_tensors(path: Path) -> None:
    header, data = header_of(good_tensors())
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    header |= {f"model.layers.{index}.extra": empty for index in range(1, 100_001)}
    write_raw(weights(path), json.dumps(header).encode(), data)


@case("no weights", "has no weights")
def _no_weights(path: Path) -> None:
    weights(path).unlink()


def offer_pickle(name: str) -> None:
    @case(f"pickle {name} offered", "convert the checkpoint to safetensors")
    def damage(path: Path) -> None:
        weights(path).rename(path / name)


for pickle_name in (
    "pytorch_model.bin",
    "consolidated.00.pth",
    "model.pt",
    "model.ckpt",
    "m.pickle",
):
    offer_pickle(pickle_name)


# ---------------------------------------------------------------- shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(path: Path) -> dict[str, str]:
    """Turn the checkpoint into two shards; returns the weight map."""
    tensors = good_tensors()
    names = list(tensors)
    weights(path).unlink()
    parts = {FIRST: names[:5], SECOND: names[5:]}
    for shard, members in parts.items():
        write_tensors(path / shard, {name: tensors[name] for name in members})
    weight_map = {name: shard for shard, members in parts.items() for name in members}
    write_index(path, weight_map)
    return weight_map


def write_index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard_named(name: str, shard: Any) -> None:
    @case(f"index: {name}", "expected the plain name")
    def damage(path: Path) -> None:
        write_index(path, sharded(path) | {NORM: shard})


shard_named("path that climbs out", "../outside.safetensors")
shard_named("absolute path", "/etc/model.safetensors")
shard_named("backslashes", "..\\model.safetensors")
shard_named("path with a NUL", "model\0.safetensors")
shard_named("file that is a pickle", "pytorch_model.bin")
shard_named("file that is a number", 7)


@case("index: shard missing", "is missing")
def _shard_missing(path: Path) -> None:
    sharded(path)
    (path / SECOND).unlink()


@case("index: tensor that its shard lacks", "but it does not")
def _shard_lacks(path: Path) -> None:
    write_index(path, sharded(path) | {"model.extra": FIRST})


@case("index: tensor in two shards", "is in model-00001")
def _twice(path: Path) -> None:
    sharded(path)
    shutil.copy(path / FIRST, path / SECOND)
    names = [*header_of(good_tensors())[0]][:5]
    write_index(path, dict.fromkeys(names, FIRST) | {names[0]: SECOND})


@case("index: no weight map", "no weight_map")
def _no_map(path: Path) -> None:
    sharded(path)
    write_index(path, None)


@case("index: not JSON", "not JSON")
def _index_not_json(path: Path) -> None:
    sharded(path)
    (path / "model.safetensors.index.json").write_text("{")


@case("shards without an index", "add it")
def _no_index(path: Path) -> None:
    sharded(path)
    (path / "model.safetensors.index.json").unlink()


# ---------------------------------------------------------------- config


def config_with(name: str, expected: str, **changes: Any) -> None:
    """A config with fields changed; `...` removes a field."""

    @case(f"config: {name}", expected)
    def damage(path: Path) -> None:
        fields = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
        (path / "config.json").write_text(json.dumps(fields))


def config_text(name: str, expected: str, text: bytes) -> None:
    @case(f"config: {name}", expected)
    def damage(path: Path) -> None:
        (path / "config.json").write_bytes(text)


config_text("empty", "is empty", b"")
config_text("not JSON", "not JSON", b"{'model_type': 'llama'}")
config_text("not UTF-8", "not UTF-8", b'{"a": "\xff"}')
config_text("a list", "expected a JSON object", b"[]")
config_text("repeated field", "appears twice", b'{"vocab_size": 1, "vocab_size": 2}')
config_text("2 MB", "expected at most", b'{"a": "' + b"x" * 2**21 + b'"}')
config_text("nested 100k deep", "nested too deeply", b'{"a":' * 100_000)
config_with("unknown architecture", "is not supported: expected one of", model_type="mamba9")
config_with("no architecture", "names no model_type", model_type=..., architectures=...)
config_with(
    "remote code", "checkpoint's own code", model_type="own", auto_map={"AutoConfig": "m.C"}
)
config_with("model type a path", "expected one of", model_type="../../llama")
config_with("model type an internal file", "expected one of", model_type="loading")
config_with("model type a list", "expected a string", model_type=["llama"])
config_with("quantized, no method", "'quant_method' is missing", quantization_config={"bits": 4})
config_with("split linears", "'pretraining_tp' is not supported", pretraining_tp=2)
config_with("soft cap", "'final_logit_softcapping'", final_logit_softcapping=30.0)
config_with("unknown activation", "hidden_act 'rellu' is not supported", hidden_act="rellu")
config_with(
    "heads do not divide",
    "'num_attention_heads' is 5",
    num_attention_heads=5,
    num_key_value_heads=5,
)
config_with("KV heads do not divide", "'num_key_value_heads' is 3", num_key_value_heads=3)
config_with("head size odd", "even rotary size", hidden_size=20)
config_with("head size odd, given", "even rotary size", head_dim=5)
config_with("zero heads", "'num_attention_heads' is 0", num_attention_heads=0)
config_with("negative KV heads", "'num_key_value_heads' is -2", num_key_value_heads=-2)
config_with("zero layers", "'num_hidden_layers' is 0", num_hidden_layers=0)
config_with("a billion layers", "'num_hidden_layers' is 1000000000", num_hidden_layers=10**9)
config_with("hidden size negative", "'hidden_size' is -16", hidden_size=-16)
config_with("hidden size 2^63", "'hidden_size'", hidden_size=2**63)
config_with("hidden size a string", "'hidden_size' is '16'", hidden_size="16")
config_with("hidden size a fraction", "'hidden_size' is 16.5", hidden_size=16.5)
config_with("hidden size null", "'hidden_size' is None", hidden_size=None)
config_with("hidden size missing", "'hidden_size' is missing", hidden_size=...)
config_with("layers true", "'num_hidden_layers' is True", num_hidden_layers=True)
config_with("vocabulary of 10^400", "'vocab_size'", vocab_size=10**400)
config_with("context of 10^12", "'max_position_embeddings'", max_position_embeddings=10**12)
config_with("context of 0", "'max_position_embeddings' is 0", max_position_embeddings=0)
config_with("rope base negative", "'rope_theta' is -10000.0", rope_theta=-10000.0)
config_with("rope base 0", "'rope_theta' is 0", rope_theta=0)
config_with("rope base NaN", "'rope_theta' is nan", rope_theta=math.nan)
config_with("rope base infinite", "'rope_theta' is inf", rope_theta=math.inf)
config_with("rope scaling a string", "'rope_scaling' is 'linear'", rope_scaling="linear")
config_with("rope scaling unknown", "rope type 'spiral'", rope_scaling={"rope_type": "spiral"})
config_with("rope factor negative", "'factor' is -2", rope_scaling={"type": "linear", "factor": -2})
config_with("rope factor missing", "'factor' is missing", rope_scaling={"type": "linear"})
config_with("norm epsilon negative", "'rms_norm_eps' is -1e-05", rms_norm_eps=-1e-5)
config_with("norm epsilon a list", "'rms_norm_eps' is [1]", rms_norm_eps=[1])
config_with("tying a string", "'tie_word_embeddings' is 'yes'", tie_word_embeddings="yes")
config_with("end token negative", "'eos_token_id' is -1", eos_token_id=-1)
config_with("end token a string", "'eos_token_id' is '</s>'", eos_token_id="</s>")
config_with("untied without a head", "'lm_head.weight' is missing", tie_word_embeddings=False)
config_with("window kinds unknown", "'layer_types'", model_type="qwen2", layer_types=["banded"])
config_with("vocabulary smaller than the tokenizer", "has shape [260, 16]", vocab_size=200)
config_with("vocabulary larger than the embedding", "the config expects [300, 16]", vocab_size=300)


@case("no config", "has no config.json")
def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


@case("a directory for the config", "not a regular file")
def _directory_config(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


@case("an empty directory", "has no config.json")
def _empty_directory(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@case("no directory", "is not here")
def _no_directory(path: Path) -> None:
    shutil.rmtree(path)


@case("generation config a list", "expected a JSON object")
def _generation_list(path: Path) -> None:
    (path / "generation_config.json").write_text("[]")


@case("generation config with a bad end token", "'eos_token_id' is [1, 'x']")
def _generation_eos(path: Path) -> None:
    (path / "generation_config.json").write_text('{"eos_token_id": [1, "x"]}')


# ---------------------------------------------------------------- tokenizer


def tokenizer_text(name: str, expected: str, text: bytes) -> None:
    @case(f"tokenizer: {name}", expected)
    def damage(path: Path) -> None:
        (path / "tokenizer.json").write_bytes(text)


tokenizer_text("empty", "is not a tokenizer", b"")
tokenizer_text("not JSON", "is not a tokenizer", b"tokens")
tokenizer_text("an empty object", "is not a tokenizer", b"{}")
tokenizer_text("100k deep", "is not a tokenizer", b"[" * 100_000)
tokenizer_text("unknown model", "is not a tokenizer", b'{"model": {"type": "Magic"}}')


@case("tokenizer: missing", "has no tokenizer: save it as tokenizer.json")
def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


@case("tokenizer: larger than the embedding", "the tokenizer has 261 tokens")
def _large_tokenizer(path: Path) -> None:
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens(["<|more|>"])
    backend.save(str(path / "tokenizer.json"))


@case("tokenizer: config not an object", "expected a JSON object")
def _tokenizer_config(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("3")


@case("tokenizer: added token without its id", "does not get its id")
def _added_token(path: Path) -> None:
    added = {"9999": {"content": "<|far|>", "special": True}}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))


@case("tokenizer: added tokens a list", "is not a tokenizer")
def _added_list(path: Path) -> None:
    (path / "tokenizer_config.json").write_text('{"added_tokens_decoder": [1]}')


@case("template a number", "expected a string or a list")
def _template_number(path: Path) -> None:
    (path / "tokenizer_config.json").write_text('{"chat_template": 7}')


@case("template of 2 MB", "expected at most|longer than")
def _template_large(path: Path) -> None:
    (path / "chat_template.jinja").write_text("x" * 2**21)
