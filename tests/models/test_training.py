"""Training of the default model: exercises with right answers, splits apart, runs that resume."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the torch extra")

from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from vivace.errors import InvalidOption  # noqa: E402
from vivace.executors.torch_ import TorchModel, dense_causal_attend  # noqa: E402
from vivace.models.loading import load_model  # noqa: E402
from vivace.training import evaluate  # noqa: E402
from vivace.training.batches import Packer  # noqa: E402
from vivace.training.corpus import read_corpus  # noqa: E402
from vivace.training.exercises import KINDS, Exercise, make_exercise  # noqa: E402
from vivace.training.recipe import TINY, TOY  # noqa: E402
from vivace.training.trainer import Trainer  # noqa: E402


def _draws(kind: str, split: str = "train") -> list[Exercise]:
    difficulties = (1, 2, 4, 6, 8) if kind not in ("recall", "quiz") else (2, 5, 12)
    return [
        make_exercise(kind, difficulty, 3, index, split, 150)
        for difficulty in difficulties
        for index in range(40)
    ]


@pytest.fixture(scope="module")
def shipped():
    with as_file(files("vivace") / "assets" / "tiny") as folder:
        yield folder


@pytest.mark.parametrize("kind", KINDS)
def test_exercises_are_a_function_of_seed_and_index(kind):
    assert _draws(kind) == _draws(kind)
    assert len({exercise.turns for exercise in _draws(kind)}) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_difficulty_below_one(kind):
    with pytest.raises(InvalidOption, match="difficulty is 0"):
        make_exercise(kind, 0, 0, 0, "train")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"chat"}))
def test_no_question_is_in_both_splits(kind):
    def questions(split):
        return {
            tuple(t.text for t in e.turns if t.role != "assistant") for e in _draws(kind, split)
        }

    assert not questions("train") & questions("heldout")


def test_no_file_is_in_both_splits_of_the_corpus():
    train, heldout = (dict(read_corpus(split).documents) for split in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert len(heldout) > 10
    assert len(train) > 10 * len(heldout)


def test_arithmetic_answers_are_right_and_so_is_every_column():
    for exercise in _draws("arithmetic"):
        question, answer = (turn.text for turn in exercise.turns)
        assert answer.endswith(f"\nAnswer: {_evaluate(question)}"), question
        for column in (word.split("=") for word in answer.split() if "=" in word):
            for left, right in pairwise(column):  # 3*4=12+2=14
                assert eval(left) == int(re.split(r"\D", right)[0]), answer


def _evaluate(question: str) -> int:
    """The value asked for, by Python's own arithmetic."""
    if question.startswith("Start with"):
        words = {"Start with": "", "Add": "+", "Subtract": "-", "Multiply by": "*"}
        expression = ""
        for sentence in question.rstrip(".").split(". "):
            verb, _, number = sentence.rpartition(" ")
            expression = f"({expression}{words[verb]}{number})"
        return eval(expression)
    return eval(re.findall(r"[0-9(][0-9()+*-]*", question)[0])


def test_procedure_answers_are_right():
    seen = set()
    for exercise in _draws("procedures"):
        question, answer = (turn.text for turn in exercise.turns)
        listed, *requests = re.findall(r"(?:^.*?list: |^List: )?([^.?]+)[.?] ?", question, re.I)
        items = listed.split()
        lines = answer.splitlines()
        assert len(lines) == len(requests)
        for request, line in zip(requests, lines, strict=True):
            result = line.rpartition(": ")[2]
            expected = _perform(request, items)
            seen.add(re.sub(r" \S*\d+$| is .*", "", request))
            if isinstance(expected, list):
                items = expected
                expected = " ".join(items) or "nothing"
            assert result == expected, (question, answer)
    assert len(seen) >= 11


def _perform(request: str, items: list[str]) -> list[str] | str:
    """A procedure's step, computed another way than the generator does."""
    array = np.array(items, dtype=object)
    last = request.split()[-1]
    is_numeric = all(item.isdigit() for item in items)
    if request == "Reverse it":
        return list(array[::-1])
    if request == "Sort it":
        return [str(n) for n in sorted(map(int, items))] if is_numeric else sorted(items)
    if request.startswith("Rotate it left by"):
        return list(np.roll(array, -int(last)))
    if request == "Write it in capitals":
        return " ".join(items).upper().split()
    if request == "Remove repeats":
        return [item for place, item in enumerate(items) if items.index(item) == place]
    if request == "Swap the first and last item":
        array[[0, -1]] = array[[-1, 0]]
        return list(array)
    if request.startswith("Remove "):
        return list(array[array != last])
    if request.startswith("Keep numbers above"):
        return [str(n) for n in map(int, items) if n > int(last)]
    if request.startswith("What is item"):
        return items[int(last) - 1]
    if request.startswith("How often is"):
        return str(items.count(request.split()[3]))
    if request == "How many items are left":
        return str(len(items))
    assert request == "What is the largest", request
    return str(max(map(int, items)))


def test_recall_answers_stand_in_the_notes():
    for exercise in _draws("recall") + _draws("quiz"):
        notes = "\n".join(turn.text for turn in exercise.turns if turn.role != "assistant")
        fact = r"^(?:.* (?:for|of) |Remember: |Note that )?(\w+) (?:is|=|maps to) (\w+)\.?$"
        facts = dict(re.findall(fact, notes, re.M))
        user = [turn.text for turn in exercise.turns if turn.role == "user"]
        answers = [turn.text for turn in exercise.turns if turn.role == "assistant"]
        for question, answer in zip(user, answers, strict=True):
            line = question.splitlines()[-1].rstrip("?").removesuffix(" map to")
            assert re.findall(r"\w+", answer)[-1] == facts[line.split()[-1]], question


def test_copies_are_the_text_with_whole_names_changed():
    for exercise in _draws("copying"):
        question, answer = (turn.text for turn in exercise.turns)
        head, _, text = question.partition(":\n")
        names = re.fullmatch(r"Rename (\w+) to (\w+)|Copy this with (\w+) changed to (\w+)", head)
        if names:
            old, new = (name for name in names.groups() if name)
            words = re.split(r"(\W+)", text)
            text = "".join(new if word == old else word for word in words)
        assert answer == text


def test_repetitions_are_the_items():
    for exercise in _draws("repetition"):
        question, answer = (turn.text for turn in exercise.turns)
        assert question.partition(": ")[2] == answer


def test_phrased_questions_have_the_same_answers():
    for exercise in _draws("phrasing"):
        *_, question, answer = (turn.text for turn in exercise.turns)
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if answer.startswith("The code"):
            key = re.findall(r"code for (\w+)", question, re.I)[0]
            told = [turn.text for turn in exercise.turns if f"code for {key} is" in turn.text]
            assert told[0].endswith(answer.partition("code for ")[2])
        elif "Answer: " in answer:
            a, b = numbers
            possible = {str(value) for value in (a + b, a - b, b - a, a * b)}
            assert answer.partition("Answer: ")[2] in possible
        else:
            kind, _, result = answer.partition(": ")
            listed = re.findall(r"\w+", question)
            if kind == "items":
                assert result.endswith(f": {result.count(',') + 1}")
            elif kind == "without repeats":
                assert len(set(result.split())) == len(result.split())
            else:
                assert {word.lower() for word in result.split()} <= {w.lower() for w in listed}


def test_shipped_tokenizer_round_trips_and_splits_numbers(shipped):
    tokenizer = Tokenizer.from_file(str(shipped / "tokenizer.json"))
    for text in (
        "37+48-29",
        "  def f(x):\n\n\treturn 'é☃'",
        "",
        "a\r\nb",
        "amber 0007",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("1234", add_special_tokens=False).tokens == list("1234")
    assert tokenizer.encode("x").tokens[0] == "<|begin|>"
    assert tokenizer.encode("<|user|>hi<|end|>").tokens[1:] == [
        "<|user|>",
        "hi",
        "<|end|>",
    ]


@pytest.fixture
def toy(shipped, tmp_path):
    """Makes toy runs in folders of their own, with the shipped tokenizer."""

    def start(name: str, is_resumed: bool = False) -> Trainer:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        shutil.copy(shipped / "tokenizer.json", folder)
        return Trainer(replace(TOY, vocab_size=4096), folder, is_resumed)

    return start


def test_a_resumed_run_ends_with_the_same_bits(toy):
    whole = toy("whole")
    whole.run(save_every=0, check_every=0)
    toy("parts").run(until_step=2, save_every=0, check_every=0)
    toy("parts", is_resumed=True).run(until_step=4, save_every=0, check_every=0)
    resumed = toy("parts", is_resumed=True)
    assert resumed.step == 4
    resumed.run(save_every=0, check_every=0)
    assert resumed.step == whole.step == TOY.num_steps
    assert resumed.num_tokens == whole.num_tokens
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    for name, value in whole.optimizer.state.items():
        assert torch.equal(value, resumed.optimizer.state[name]), name


def test_loss_falls_when_one_batch_is_learned(toy):
    trainer = toy("overfit")
    stages = (replace(TOY.stages[0], until_step=60),)
    trainer.recipe = replace(trainer.recipe, stages=stages, rates=((0, 0.5), (60, 0.5)))
    batch = trainer.packer.batch(TOY.stages[0], 0)
    first = trainer.loss(batch)[0].item()
    for trainer.step in range(25):
        trainer.learn(batch)
    assert trainer.loss(batch)[0].item() < first / 2


def test_batches_weigh_answers_and_never_the_padding_or_questions(toy):
    packer = toy("batches").packer
    exercise = make_exercise("arithmetic", 2, 1, 1, "train")
    ids, weights = packer.encode(exercise)
    counted = [token for token, weight in zip(ids, weights, strict=True) if weight == 1.0]
    assert packer.tokenizer.decode(counted) == exercise.turns[1].text
    assert counted[-1] == packer.end
    assert set(weights) == {0.0, 1.0}


def test_rates_warm_up_stay_and_decay_to_nothing():
    rates = [TINY.rate(step) for step in range(TINY.num_steps)]
    assert rates[0] < 0.02
    assert max(rates) == rates[100] == rates[TINY.num_steps // 2] == 1.0
    assert 0 < rates[-1] < 0.01
    stages = [TINY.stage(step) for step in range(TINY.num_steps)]
    contexts = [stage.context for stage in stages]
    assert contexts == sorted(contexts)
    assert max(contexts) == TINY.shape["max_position_embeddings"]
    assert all(sum(stage.mix.values()) == pytest.approx(1) for stage in stages)


@pytest.fixture(scope="module")
def model(shipped):
    weights = {n: w.float() for n, w in load_file(shipped / "model.safetensors").items()}
    return TorchModel(load_model(shipped).graph, weights)


def _answer(model, shipped: Path, question: str, max_tokens: int = 60) -> str:
    packer = Packer(Tokenizer.from_file(str(shipped / "tokenizer.json")), 0)
    ids = packer.tokenizer.encode(f"<|user|>{question}<|end|><|assistant|>").ids
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + max_tokens and ids[-1] != packer.end:
            positions = torch.arange(len(ids))
            hidden = model.embed(torch.tensor(ids), positions)
            hidden = model.forward(hidden, positions, dense_causal_attend(1))
            ids.append(int(model.logits(hidden[-1:]).argmax()))
    return packer.tokenizer.decode(ids[start:])


def test_shipped_model_recalls_and_reckons(model, shipped):
    notes = "\n".join(f"The code for {k} is {v}." for k, v in (("amber", 4821), ("river", 1029)))
    assert "4821" in _answer(
        model, shipped, f"Read these notes.\n{notes}\nWhat is the code for amber?"
    )
    assert _answer(model, shipped, "Compute 7+8.").endswith("Answer: 15")


def test_shipped_model_is_as_good_as_its_card_says_roughly(model, shipped):
    packer = Packer(Tokenizer.from_file(str(shipped / "tokenizer.json")), 0)
    assert evaluate.answers(model, packer, "recall", 4, 6, 400).token_share > 0.9
    score = evaluate.answers(model, packer, "arithmetic", 3, 12)
    assert score.token_share > 0.5


def test_shipped_files_are_small_and_hold_the_tied_head_once(shipped):
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 30_000_000
    weights = load_file(shipped / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert 4e6 < sum(weight.numel() for weight in weights.values()) < 15e6
    assert "Held-out" in (shipped / "MODEL_CARD.md").read_text()


def test_filler_comes_from_the_split_asked_for():
    heldout = {line for _, lines in read_corpus("heldout").documents for line in lines}
    exercise = make_exercise("recall", 2, 1, 1, "heldout", 600)
    lines = exercise.turns[0].text.splitlines()
    assert sum(line in heldout for line in lines) > len(lines) / 2
    assert read_corpus("heldout").lines(Random(1), 100)
