"""How far our logits are from llama.cpp's on the same GGUF files, quantized by llama.cpp itself.

    python -m benchmarks.agreement [--sequences 32]

`tiny` is written as F32, quantized by llama.cpp to each type, and run by both on held-out exercises
and text. llama.cpp rounds activations to 8 bits where weights are quantized; so each file is also
compared after the gguf package has decoded its blocks to F32, where nothing is rounded and what is
left is the reading of the file. Needs `make peers`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import table
from benchmarks.harness import LLAMA_CPP, ROOT, run_quietly, save
from vivace import LLM
from vivace.models.gguf.write import Storage, write_gguf
from vivace.models.loading import load_model
from vivace.training.batches import Packer
from vivace.training.corpus import read_corpus
from vivace.training.exercises import make_exercise

FILE_TYPES = {  # llama_ftype: what llama.cpp's own quantize tool takes
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
}
EXERCISES = {"arithmetic": (1, 2, 3), "procedures": (1, 2), "recall": (2, 4), "copying": (1,)}
LENGTH = 192


def held_out(num_sequences: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sequences [n, LENGTH], and by name which rows to compare [n, LENGTH - 1].

    Half of them are exercises, of which the answers are a part of their own; half are text.
    """
    from tokenizers import Tokenizer

    path = load_model("tiny").path / "tokenizer.json"
    packer = Packer(Tokenizer.from_file(str(path)), 0)
    draws = [(kind, level) for kind, levels in EXERCISES.items() for level in levels]
    sequences, answers, used = [], [], []
    index = 0
    while len(sequences) < num_sequences // 2:
        kind, level = draws[index % len(draws)]
        ids, weights = packer.encode(make_exercise(kind, level, 5, index, "heldout", 150))
        index += 1
        if len(ids) > LENGTH:
            continue
        padding = [0] * (LENGTH - len(ids))
        sequences.append([*ids, *padding])
        answers.append([*(np.asarray(weights[1:]) == 1.0), *(False for _ in padding)])
        used.append([True] * (len(ids) - 1) + [False] * len(padding))
    num_exercises = len(sequences)
    for _, lines in read_corpus("heldout").documents:
        ids = packer.tokenizer.encode("\n".join(lines), add_special_tokens=False).ids
        if len(ids) >= LENGTH - 1 and len(sequences) < num_sequences:
            sequences.append([packer.begin, *ids[: LENGTH - 1]])
    is_text = np.zeros((len(sequences), LENGTH - 1), bool)
    is_text[num_exercises:] = True
    rows = {"text": is_text}
    for name, chosen in (("answers", answers), ("exercises", used)):
        rows[name] = np.zeros_like(is_text)
        rows[name][:num_exercises] = np.array(chosen)
    return np.array(sequences, np.int32), rows


def peer(script: str, *arguments: str | Path) -> None:
    """Run one of the scripts for the peers' interpreter."""
    run_quietly([LLAMA_CPP, ROOT / "tests/peers" / script, *arguments])


def decode_to_f32(source: Path, target: Path) -> None:
    """The same file with its blocks decoded by the gguf package."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        data = np.asarray(tensor.data)
        if tensor.tensor_type is not GGMLQuantizationType.F32:
            data = quants.dequantize(data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def our_logits(path: Path, sequences: np.ndarray, weights: str | None = None) -> np.ndarray:
    with LLM(str(path), weights=weights, kv="float32", max_context=LENGTH) as llm:
        return np.stack(
            [np.concatenate([b.copy() for b in llm.logits(ids.tolist())]) for ids in sequences]
        )


def differences(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Of logits [rows, vocab]; the divergence is that of ours from theirs, in nats a token."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (theirs, ours))
    divergence = (np.exp(p) * (p - q)).sum(-1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "largest_difference": float(np.abs(theirs - ours).max()),
        "mean_difference": float(np.abs(theirs - ours).mean()),
    }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(folder: Path, name: str, path: Path, tokens: Path, rows: dict[str, Any]) -> Any:
    sequences = np.load(tokens)
    peer("llama_logits.py", path, tokens, folder / "theirs.npy")
    theirs = np.load(folder / "theirs.npy")[:, :-1]
    ours = our_logits(path, sequences)
    result: dict[str, Any] = {
        part: differences(theirs[chosen], ours[chosen]) for part, chosen in rows.items()
    }
    if name != "F32":
        decode_to_f32(path, folder / "decoded.gguf")
        peer("llama_logits.py", folder / "decoded.gguf", tokens, folder / "theirs.npy")
        theirs = np.load(folder / "theirs.npy")[:, :-1]
        ours = our_logits(path, sequences, "float32")
        every = rows["text"] | rows["exercises"]
        result["decoded"] = differences(theirs[every], ours[every])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=32)
    arguments = parser.parse_args()
    if not LLAMA_CPP.exists():
        sys.exit("needs llama.cpp: run 'make peers' first")
    sequences, rows = held_out(arguments.sequences)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens, source = folder / "tokens.npy", folder / "F32.gguf"
        np.save(tokens, sequences)
        tiny = load_model("tiny")
        no_tokenizer = {"tokenizer.ggml.model": "none"}
        write_gguf(source, tiny.graph, tiny.weights, tiny.config, no_tokenizer, Storage.F32)
        results["F32"] = compare(folder, "F32", source, tokens, rows)
        for name, file_type in FILE_TYPES.items():
            path = folder / f"{name}.gguf"
            peer("llama_quantize.py", source, path, str(file_type))
            results[name] = compare(folder, name, path, tokens, rows)
            path.unlink()
            print(
                name, {k: f"{v['kl_mean']:.2e} {v['top1']:.4f}" for k, v in results[name].items()}
            )
    num_rows = {name: int(chosen.sum()) for name, chosen in rows.items()}
    print(f"written {save('agreement', {'rows': num_rows, 'types': results})}")
    table.main()


if __name__ == "__main__":
    main()
