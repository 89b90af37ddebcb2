"""A checkpoint as a graph and mapped weights, checked against each other before they run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from vivace import _native
from vivace.blocks import ModelGraph, weight_refs
from vivace.errors import BadFile, ModelNotFound, UnsupportedModel
from vivace.models import graph_from_config, name_prefix
from vivace.models.config import Config, show
from vivace.models.formats.mapped_file import Identity
from vivace.models.formats.packed_file import PackedFile
from vivace.models.formats.safetensors import SafetensorsFile, TensorInfo
from vivace.models.formats.strict_json import read_object
from vivace.models.location import resolve
from vivace.models.packing import is_packed, packed_graph
from vivace.models.quantized.matrices import QuantizedMatrix
from vivace.models.tokenizer import Tokenizer
from vivace.techniques.weight_formats.base import Packed

if TYPE_CHECKING:
    from vivace.models.formats.block_tensor import BlockTensor

__all__ = ["LoadedModel", "Weights", "load_model"]

MAX_CONFIG_BYTES = 2**20
# Weights up to this size in total are searched for NaN and infinity when loaded: some milliseconds.
# Of larger checkpoints only the tensors below `_SMALL_TENSOR_BYTES` are, so that opening one, as an
# estimate does, only maps it. The native executor searches every matrix when it binds it.
_SMALL_MODEL_BYTES = 64 * 2**20
_SMALL_TENSOR_BYTES = 2**20
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# Tensors of a model's layers or its head's bias; the layers of heads for further tokens are not.
_USED = re.compile(r"(model\.)?(layers|h)\.\d+\.|lm_head\.bias$|blk\.\d+\.|output\.bias$")
# Causal masks and rotary frequencies that old checkpoints store.
_DERIVED = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


class TensorFile(Protocol):
    """A file of tensors, or several that are one, checked when it was opened."""

    path: Path
    tensors: dict[str, TensorInfo]

    @property
    def identities(self) -> Sequence[Identity]: ...

    def release(self) -> None:
        """Let go of the pages that were read; they count as memory of the process until then."""
        ...

    def array(self, name: str) -> np.ndarray | BlockTensor | Packed | QuantizedMatrix: ...


class Weights(Mapping[str, Any]):
    """Checkpoint tensors by name, as read-only views of the mapped files.

    A quantized matrix is a `BlockTensor` or a `QuantizedMatrix`, decoded where `np.asarray` asks
    for its rows, or is `Packed`.

    Args:
        files: the shards.
        prefix: left out of the names that start with it.
    Raises:
        BadFile: a name is there with and without the prefix.
    """

    def __init__(self, files: Sequence[TensorFile], prefix: str = "") -> None:
        self.files: Sequence[TensorFile] = tuple(files)
        self._stored: dict[str, tuple[TensorFile, str]] = {}
        for file in files:
            for stored in file.tensors:
                name = stored.removeprefix(prefix)
                if name in self._stored:
                    raise BadFile(
                        f"{file.path}: tensor {show(name)} is there with '{prefix}' and without: "
                        "expected one of the two"
                    )
                self._stored[name] = file, stored

    def __getitem__(self, name: str) -> Any:
        file, stored = self._stored[name]
        return file.array(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def info(self, name: str) -> TensorInfo:
        file, stored = self._stored[name]
        return file.tensors[stored]

    def path(self, name: str) -> Path:
        return self._stored[name][0].path

    @property
    def identities(self) -> list[Identity]:
        """What tells the files from others, and from themselves when they change."""
        return [identity for file in self.files for identity in file.identities]

    def release(self) -> None:
        for file in self.files:
            file.release()

    def check_finite(self, names: list[str]) -> None:
        """Search tensors for NaN and infinity. Raises `BadFile` that names the first."""
        for name in names:
            if not _is_finite(self[name]):
                raise BadFile(
                    f"{self.path(name)}: tensor {show(name)} has NaN or infinite values: "
                    "the checkpoint is damaged; download it again or use another one"
                )


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be run: the block list, its weights, and what came beside them.

    `path` is a directory or a GGUF file; `make_tokenizer` is None where the model has none.
    """

    path: Path
    graph: ModelGraph
    weights: Weights
    config: Config
    generation_config: Config
    make_tokenizer: Callable[[], Tokenizer] | None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Parsed on first use. Raises `BadFile`, `ModelNotFound`."""
        if self.make_tokenizer is None:
            raise ModelNotFound(
                f"{self.path}: has no tokenizer: save it as tokenizer.json beside the weights, or "
                "give token ids"
            )
        tokenizer = self.make_tokenizer()
        if tokenizer.vocab_size > self.graph.vocab_size:
            raise BadFile(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens but the embedding "
                f"only {self.graph.vocab_size} rows: the two are not of one model"
            )
        return tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self.make_tokenizer is not None

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's or else the config's, and the
        tokenizer's."""
        ids = self.generation_config.token_ids("eos_token_id")
        ids = ids or self.config.token_ids("eos_token_id")
        own = self.tokenizer.eog_token_ids if self.has_tokenizer else frozenset()
        return frozenset(item for item in (*ids, *own) if item < self.graph.vocab_size)

    @property
    def dtype(self) -> str:
        """The float type of most matrices; of packed ones, what they were before."""
        sizes: dict[str, int] = {}
        for info in self._matrix_infos():
            sizes[info.dtype.name] = sizes.get(info.dtype.name, 0) + math.prod(info.shape)
        return max(sizes, key=lambda name: sizes[name])

    @property
    def weight_format(self) -> dict[str, Any]:
        """The weight format that stores matrices as the checkpoint does."""
        is_quantized = any(info.is_quantized for info in self._matrix_infos())
        return {"name": "stored" if is_quantized else self.dtype}

    def _matrix_infos(self) -> list[TensorInfo]:
        names = {ref.name for ref in self.graph.linears()}
        return [self.weights.info(name) for name in sorted(names)]

    def check_files(self) -> None:
        """Read files that carry a checksum whole. Raises `BadFile` if one is damaged."""
        for file in self.weights.files:
            if isinstance(file, PackedFile):
                file.check()

    def check_all_weights(self) -> None:
        """Search every tensor for NaN and infinity; reads the whole checkpoint."""
        self.weights.check_finite(sorted(_stored_shapes(self.graph)))


def load_model(location: str | Path) -> LoadedModel:
    """Load a model by shipped name, directory, GGUF file or hub name; weights are mapped, not read.

    Raises `ModelNotFound`, `UnsupportedModel`, `BadFile`.
    """
    path = resolve(location)
    model = _from_gguf(path) if path.is_file() else _from_directory(path)
    for fields in (model.config, model.generation_config):
        for name in ("eos_token_id", "bos_token_id"):
            fields.token_ids(name)
    _check_weights(path, model.graph, model.weights)
    return model


def _from_directory(path: Path) -> LoadedModel:
    config = _read_config(path, "config.json")
    assert config is not None
    section = config.section("quantization_config")  # families refuse what nobody has read
    packed = is_packed(config.values)
    graph = graph_from_config(config)
    generation = _read_config(path, "generation_config.json", is_required=False)
    generation = generation or Config({}, "generation_config.json")
    if packed:
        graph = packed_graph(graph)
        weights = Weights([PackedFile(path / "model.safetensors")], name_prefix(graph.family))
    else:
        weights = Weights(_open_files(path), name_prefix(graph.family))
    if section is not None and not packed:
        # Imported late: other models start without them.
        from vivace.models.quantized.tensors import QuantizedTensors, read_method

        weights = Weights([QuantizedTensors(weights, read_method(config), graph, path)])
    has_tokenizer = (path / "tokenizer.json").exists()
    make_tokenizer = partial(Tokenizer.load, path) if has_tokenizer else None
    return LoadedModel(path, graph, weights, config, generation, make_tokenizer)


def _from_gguf(path: Path) -> LoadedModel:
    # Imported late: a model in a directory starts without them.
    from vivace.models.formats.gguf import GgufFile
    from vivace.models.gguf.checkpoint import GgufTensors, generation_config, read_graph
    from vivace.models.gguf.tokenizer import tokenizer_from_metadata

    file = GgufFile(path)
    graph, config = read_graph(file)
    source, metadata = str(path), file.metadata
    kind = Config(metadata, f"{source}: metadata").text("tokenizer.ggml.model", "none")
    has_tokenizer = kind not in ("none", "no_vocab")
    make_tokenizer = partial(tokenizer_from_metadata, metadata, source) if has_tokenizer else None
    generation = generation_config(metadata, source)
    return LoadedModel(
        path, graph, Weights([GgufTensors(file)]), config, generation, make_tokenizer
    )


def _read_config(path: Path, name: str, is_required: bool = True) -> Config | None:
    file = path / name
    if not file.exists():
        if not is_required:
            return None
        raise ModelNotFound(f"{path}: has no {name}: expected a model directory as on the hub")
    return Config(read_object(file, MAX_CONFIG_BYTES), str(file))


# ---------------------------------------------------------------- files


def _open_files(path: Path) -> list[SafetensorsFile]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [SafetensorsFile(single)]
    if index.exists():
        return _open_shards(path, index)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return [SafetensorsFile(found[0])]
    if found:
        raise BadFile(f"{path}: has {len(found)} safetensors files but no {index.name}: add it")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise UnsupportedModel(
            f"{path}: {pickles[0]} is a pickle, which can run code when read: "
            "convert the checkpoint to safetensors"
        )
    raise ModelNotFound(f"{path}: has no weights: expected {single.name} or {index.name}")


def _open_shards(path: Path, index: Path) -> list[SafetensorsFile]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{index}: has no weight_map: expected tensor names and their files")
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not _is_plain_name(shard):
            raise BadFile(
                f"{index}: tensor {show(name)} is said to lie in {show(shard)}: "
                "expected the plain name of a .safetensors file in the same directory"
            )
        by_shard.setdefault(shard, []).append(name)
    missing = sorted(shard for shard in by_shard if not (path / shard).exists())
    if missing:
        raise BadFile(
            f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(by_shard)}): "
            "download the model again"
        )
    files = {shard: SafetensorsFile(path / shard) for shard in sorted(by_shard)}
    owners: dict[str, str] = {}
    for shard, file in files.items():
        for name in file.tensors:
            if owners.setdefault(name, shard) != shard:
                raise BadFile(f"{path}: tensor {show(name)} is in {owners[name]} and in {shard}")
        for name in by_shard[shard]:
            if name not in file.tensors:
                raise BadFile(
                    f"{index}: says that {shard} holds tensor {show(name)}, but it does not: "
                    "download the model again"
                )
    return list(files.values())


def _is_plain_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value.endswith(".safetensors")
        and len(value) < 256
        and not any(sign in value for sign in ("/", "\\", "\0", ":"))
    )


# ---------------------------------------------------------------- tensors


def _check_weights(path: Path, graph: ModelGraph, weights: Weights) -> None:
    wanted = _stored_shapes(graph)
    for name, shape in wanted.items():
        if name not in weights:
            raise BadFile(
                f"{path}: tensor {show(name)} is missing: expected shape {list(shape)}; "
                "the config does not fit the weights, or a file is missing"
            )
        _check_tensor(weights, name, shape)
    unused = sorted(name for name in weights if name not in wanted and _would_matter(name))
    if unused:
        raise UnsupportedModel(
            f"{path}: tensor {show(unused[0])} has no place in a '{graph.family}' model of this "
            f"config ({len(unused)} such): check config.json, or use an unquantized checkpoint"
        )
    num_bytes = sum(weights.info(name).num_bytes for name in wanted)
    limit = _SMALL_MODEL_BYTES if num_bytes <= _SMALL_MODEL_BYTES else _SMALL_TENSOR_BYTES
    weights.check_finite([name for name in wanted if weights.info(name).num_bytes <= limit])


def _stored_shapes(graph: ModelGraph) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a graph uses; ranges of rows must reach to the last one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for ref in weight_refs(graph):
        shape = (ref.first_row + ref.shape[0], *ref.shape[1:])
        shape = shape[::-1] if ref.is_transposed else shape
        shapes[ref.name] = max(shapes.get(ref.name, shape), shape)
    return shapes


def _would_matter(name: str) -> bool:
    """Whether a tensor that the graph does not use would change the output if it were used."""
    return bool(_USED.match(name)) and not _DERIVED.search(name)


def _check_tensor(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    info = weights.info(name)
    where = f"{weights.path(name)}: tensor {show(name)}"
    if info.dtype not in _FLOATS:
        raise UnsupportedModel(
            f"{where} is stored as {info.dtype}: expected float32, float16 or bfloat16"
        )
    if info.shape != shape:
        raise BadFile(
            f"{where} has shape {list(info.shape)}: the config expects {list(shape)}; "
            "config and weights are not of one model"
        )


def _is_finite(stored: np.ndarray | BlockTensor | Packed | QuantizedMatrix) -> bool:
    """Whether no exponent is all ones; works on the bits, a piece that fits the cache at a time."""
    if isinstance(stored, Packed):
        return _native.is_finite(stored, 1)  # starting threads takes longer than a small one
    if isinstance(stored, QuantizedMatrix):
        return stored.is_finite()
    array = np.asarray(stored)
    if array.dtype == np.float32:
        bits, mask = array.reshape(-1).view(np.uint32), np.uint32(0x7F800000)
    else:
        mask = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
        bits = array.reshape(-1).view(np.uint16)
    step = 2**17
    return not any(
        ((bits[first : first + step] & mask) == mask).any() for first in range(0, len(bits), step)
    )
