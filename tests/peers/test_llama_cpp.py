"""What is exported is the same model for llama.cpp: its tokens, its greedy answers, its logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peer import PYTHON, LlamaCpp, has_peers
from random_texts import FIXED_TEXTS
from text_models import PUBLISHED, published, write_checkpoint

from vivace import LLM, SamplingParams
from vivace.models.gguf.export import export_gguf
from vivace.models.gguf.write import Storage
from vivace.models.loading import load_model
from vivace.training.exercises import KINDS, make_exercise

sys.path.append(str(Path(__file__).parents[1] / "models"))
from checkpoints import make_executor, run_logits

pytestmark = pytest.mark.skipif(not has_peers(), reason="`make peers` builds llama.cpp")

PROMPTS = ("Hello world", "don't 123", "x = a[1];\n", "日本語", "Привет, мир!", "  y", "fox's den")


def their_logits(model: Path, sequences: list[list[int]], folder: Path) -> np.ndarray:
    """llama.cpp's logits [sequences, longest, vocab]; rows behind a sequence's end are noise."""
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    np.save(folder / "tokens.npy", tokens)
    script = Path(__file__).with_name("llama_logits.py")
    command = [PYTHON, script, model, folder / "tokens.npy", folder / "logits.npy"]
    subprocess.run(command, check=True, capture_output=True)
    return np.load(folder / "logits.npy")


def count_same_answers(
    file: Path, asked: list[list[int]], answered: list[list[int]], folder: Path
) -> int:
    """Answers of which each token is the likeliest one for llama.cpp, too."""
    sequences = [prompt + answer for prompt, answer in zip(asked, answered, strict=True)]
    logits = their_logits(file, sequences, folder)
    return sum(
        logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].argmax(-1).tolist() == answer
        for row, (prompt, answer) in enumerate(zip(asked, answered, strict=True))
    )


def our_answers(location: str | Path, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(str(location), weights="float32", kv="float32") as llm:
        return [llm.generate(prompt, params).choices[0].token_ids for prompt in prompts]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), published("gpt-2"))


@pytest.mark.parametrize("pre", [name for name in PUBLISHED if name not in ("tekken", "gpt-4o")])
def test_texts_become_the_same_tokens(pre, tmp_path):
    source = load_model(write_checkpoint(tmp_path / "model", published(pre)))
    export_gguf(source, tmp_path / "model.gguf", None, None)
    texts: list[str] = [*PROMPTS, *(FIXED_TEXTS if pre == "gpt-2" else ())]
    with LlamaCpp(tmp_path / "model.gguf") as peer:
        theirs = peer.tokenize(texts, True, False)
        assert peer.described["adds_bos"] is False
        assert source.tokenizer.eog_token_ids <= set(peer.described["end"])
    for text, tokens in zip(texts, theirs, strict=True):
        if "\U00016d40" not in text:  # a letter newer than its tables
            assert source.tokenizer.encode(text) == tokens, text


@pytest.mark.parametrize("storage", [Storage.F32, Storage.F16])
def test_greedy_answers_are_the_same(storage, checkpoint, tmp_path):
    source, file = load_model(checkpoint), tmp_path / "model.gguf"
    export_gguf(source, file, storage, None)
    asked = [source.tokenizer.encode(text) for text in PROMPTS]
    answered = our_answers(file, asked)
    assert len({token for answer in answered for token in answer}) > 20
    assert count_same_answers(file, asked, answered, tmp_path) == len(PROMPTS)


def test_quantized_logits_are_near(checkpoint, tmp_path):
    """Theirs rounds inputs to blocks, too."""
    source, file = load_model(checkpoint), tmp_path / "model.gguf"
    export_gguf(source, file, Storage.Q8_0, None)
    model = load_model(file)
    tokens = np.asarray(source.tokenizer.encode(" ".join(PROMPTS)), np.int32)
    running = make_executor("native", model.graph, model.weights)
    ours = _log_softmax(run_logits(running, tokens, 7))
    theirs = _log_softmax(their_logits(file, [tokens.tolist()], tmp_path)[0])
    kl = (np.exp(ours) * (ours - theirs)).sum(-1)
    assert kl.max() < 0.02
    assert kl.mean() < 0.004


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_shipped_model_answers_exercises_the_same(tmp_path):
    """In both, from the same tokens: how texts are cut is what its file cannot say."""
    source, file = load_model("tiny"), tmp_path / "tiny.gguf"
    export_gguf(source, file, Storage.F32, "smollm")
    asked = []
    for index in range(20):
        kind = list(KINDS)[index % len(KINDS)]
        turns = make_exercise(kind, 2, 0, index, "heldout").turns
        messages = [{"role": turn.role, "content": turn.text} for turn in turns[:-1]]
        asked.append(source.tokenizer.encode_chat(messages))
    answered = our_answers("tiny", asked)
    assert count_same_answers(file, asked, answered, tmp_path) == 20
