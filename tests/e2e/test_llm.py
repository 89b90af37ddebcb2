"""The public API on the shipped model, as a user would call it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from vivace import LLM, Plan, SamplingParams
from vivace.engine import Limits
from vivace.errors import (
    BadFile,
    InvalidOption,
    InvalidRequest,
    OutOfBlocks,
    PromptTooLong,
    UserError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny", threads=2) as made:
        yield made


def test_one_prompt_gives_one_completion(llm):
    done = llm.generate("import os\nimport", GREEDY)
    assert done.text == llm.tokenizer.decode(done.token_ids)
    assert len(done.token_ids) == 12
    assert done.finish_reason == "length"
    assert done.timing.num_tokens == 12
    assert done.timing.num_prompt_tokens == len(done.prompt_token_ids)
    assert done.timing.prefill_seconds > 0


def test_a_list_gives_a_list_in_order_and_ids_equal_text(llm):
    prompts = ["a = 1\n", "def f(", "The "]
    batch = llm.generate(prompts, GREEDY)
    ids = llm.generate([llm.tokenizer.encode(prompt) for prompt in prompts], GREEDY)
    assert [done.text for done in batch] == [llm.generate(p, GREEDY).text for p in prompts]
    assert [done.token_ids for done in ids] == [done.token_ids for done in batch]


def test_a_stream_joins_to_the_text(llm):
    deltas = list(llm.stream("class A:", GREEDY))
    assert "".join(delta.text for delta in deltas) == llm.generate("class A:", GREEDY).text
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].timing is not None


def test_leaving_a_stream_cancels_it(llm):
    used = llm.engine.pool.num_used
    stream = llm.stream("x", SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    assert llm.engine.pool.num_used > used
    stream.close()
    assert llm.engine.pool.num_used == used


def test_async_twins_answer_alike(llm):
    messages = [{"role": "user", "content": "Hello"}]

    async def run():
        one, many, chat = await asyncio.gather(
            llm.agenerate("a = ", GREEDY),
            llm.agenerate(["b = ", "c = "], GREEDY),
            llm.achat(messages, GREEDY),
        )
        text = "".join([delta.text async for delta in llm.astream("a = ", GREEDY)])
        return one.text, [done.text for done in many], chat.text, text

    one, many, chat, text = asyncio.run(run())
    assert one == text == llm.generate("a = ", GREEDY).text
    assert many == [done.text for done in llm.generate(["b = ", "c = "], GREEDY)]
    assert chat == llm.chat(messages, GREEDY).text


def test_n_choices_and_logprobs(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=1)
    done = llm.generate("import sys", params)
    assert len(done.choices) == 3
    for choice in done.choices:
        assert [line.token_id for line in choice.logprobs] == choice.token_ids
        assert all(len(line.top) == 2 and line.logprob <= 0 for line in choice.logprobs)
    assert len(done.prompt_logprobs) == len(done.prompt_token_ids) - 1
    again = llm.generate("import sys", params)
    assert [c.token_ids for c in again.choices] == [c.token_ids for c in done.choices]


def test_scores_are_the_log_softmax_of_the_logits(llm):
    ids = llm.tokenizer.encode("for i in range(10):")
    logits = np.concatenate([block.copy() for block in llm.logits(ids)]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scored = [line.logprob for line in llm.score(ids)]
    assert scored == pytest.approx(expected[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
    continuation = llm.score(ids[:4], ids[4:])
    assert [line.logprob for line in continuation] == scored[3:]


def test_embedding_is_the_mean_of_the_last_states(llm):
    states = llm.hidden_states("def f(x): return x")
    assert states.shape[1] == llm.graph.hidden_size
    assert llm.embed("def f(x): return x") == pytest.approx(states.mean(0), abs=1e-4)


def test_branches_share_and_diverge(llm):
    async def run():
        root = llm.branch("def f(", GREEDY)
        children = [root.fork() for _ in range(3)]
        texts = await asyncio.gather(*(child.extend(max_tokens=8) for child in children))
        scores = await root.score([5, 6])
        for branch in (root, *children):
            branch.drop()
        return texts, scores

    texts, scores = asyncio.run(run())
    assert len(set(texts)) == 1  # greedy: the same path
    assert len(scores) == 2
    llm.engine.step()
    assert llm.engine.pool.num_used == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_context": 0}, InvalidOption),
        ({"max_context": 10**9}, InvalidOption),
        ({"max_context": 1.5}, InvalidOption),
        ({"threads": "2"}, InvalidOption),
        ({"threads": 1.5}, InvalidOption),
        ({"cache_bytes": "5"}, InvalidOption),
        ({"weights": "float23"}, UserError),
        ({"kv": {"name": "float32", "bits": 3}}, UserError),
        ({"plan": "no/such/plan.toml"}, UserError),
        ({"cache_bytes": 1}, OutOfBlocks),
        ({"model": "no-such-model"}, UserError),
    ],
)
def test_bad_arguments_are_refused(arguments, error):
    with pytest.raises(error):
        LLM(**{"model": "tiny"} | arguments)


@pytest.mark.parametrize(
    "prompt", [[[]], [1, -1], [99999], [1.5], [True], 5, ["a", 3], "\ud800", b"hi"]
)
def test_bad_prompts_are_refused_and_the_engine_lives(llm, prompt):
    with pytest.raises(InvalidRequest):
        llm.generate(prompt, GREEDY)
    assert llm.generate("ok", GREEDY).token_ids


def test_a_long_prompt_is_refused_with_both_numbers(llm):
    with pytest.raises(PromptTooLong, match=r"2048 tokens .* 2048"):
        llm.generate([1] * 2048, GREEDY)


def test_wrong_kinds_of_arguments_are_refused(llm):
    for block in (True, "x", 99):
        with pytest.raises(InvalidRequest):
            llm.hidden_states("ab", block=block)
    with pytest.raises(InvalidRequest):
        llm.generate("a", {"temperature": 0})
    with pytest.raises(InvalidRequest):
        list(llm.logits([[1, 2]]))
    with pytest.raises(InvalidRequest):
        next(llm.stream("a", GREEDY, tools=[{}]))
    assert llm.score("a b", []) == []


def test_a_stream_loses_nothing_to_another_call_that_steps(llm):
    expected = llm.generate("class A:", GREEDY)
    stream = llm.stream("class A:", GREEDY)
    first = next(stream)
    llm.engine.run_until_done()
    deltas = [first, *stream]
    assert "".join(delta.text for delta in deltas) == expected.text
    assert deltas[-1].finish_reason == "length"
    ids = list(range(200))
    whole = np.concatenate(list(llm.logits(ids)))
    blocks = llm.logits(ids)
    parts = [next(blocks)]
    llm.engine.run_until_done()
    assert np.array_equal(np.concatenate([*parts, *blocks]), whole)


def test_many_threads_stream_alike(llm):
    expected, texts = llm.generate("The ", GREEDY).text, []

    def run():
        texts.append("".join(delta.text for delta in llm.stream("The ", GREEDY)))

    workers = [threading.Thread(target=run) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert texts == [expected] * 8


def test_errors_reach_whoever_reads_logits(llm, monkeypatch):
    def fail(step):
        raise RuntimeError("the executor failed")

    monkeypatch.setattr(llm.engine.executor, "forward", fail)
    with pytest.raises(RuntimeError, match="the executor failed"):
        list(llm.logits([1, 2, 3]))


def test_a_batch_is_refused_as_a_whole(llm):
    before = llm.engine.stats.num_forwards
    with pytest.raises(InvalidRequest):
        llm.generate([*[[1, 2]] * 20, [99999]], GREEDY)
    with pytest.raises(PromptTooLong):
        asyncio.run(llm.agenerate([*[[1, 2]] * 20, [1] * 2048], GREEDY))
    assert llm.engine.stats.num_forwards == before
    assert not llm.engine.has_work


def test_an_error_of_one_ends_an_async_batch(llm, monkeypatch):
    forward = llm.engine.executor.forward

    def fail(step):
        if 77 in step.tokens:
            raise RuntimeError("token 77 fails")
        return forward(step)

    monkeypatch.setattr(llm.engine.executor, "forward", fail)
    with pytest.raises(RuntimeError, match="token 77 fails"):
        asyncio.run(llm.agenerate([[1], [77], [2]], SamplingParams(max_tokens=1000)))
    llm.engine.run_until_done()
    assert llm.engine.pool.num_used == 0


def test_a_batch_may_be_longer_than_the_queue(llm, monkeypatch):
    monkeypatch.setattr(llm.engine.scheduler, "limits", Limits(max_queued_requests=4))
    monkeypatch.setattr(llm.engine, "limits", Limits(max_queued_requests=4))
    prompts = [[i] for i in range(1, 30)]
    params = SamplingParams(temperature=0, max_tokens=2)
    done = llm.generate(prompts, params)
    again = asyncio.run(llm.agenerate(prompts, params))
    assert [d.prompt_token_ids for d in done] == prompts
    assert [d.token_ids for d in done] == [d.token_ids for d in again]


def test_a_model_without_tokenizer_ends_by_its_config(llm, tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(llm.model.path / name, tmp_path)
    with LLM(tmp_path) as bare:
        assert bare.engine.eos_ids
        assert bare.generate([1, 2], GREEDY).token_ids == llm.generate([1, 2], GREEDY).token_ids
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}', encoding="utf-8")
    with pytest.raises(BadFile, match=r"generation_config.json: top_p is 7"), LLM(tmp_path) as bare:
        bare.default_params()


def test_an_instruction_set_is_an_option():
    with LLM("tiny", isa="generic") as made:
        assert getattr(made.engine.executor, "isa") == "generic"  # noqa: B009


def test_formats_are_options(llm):
    prompt = list(range(40))
    logits = next(llm.logits(prompt)).copy()
    with LLM("tiny", weights="float32", kv="float32") as wide:
        exact = next(wide.logits(prompt)).copy()
    layercast = Plan.of(
        weight_formats={"name": "bfloat16", "arithmetic": "float32"}, kv_stores="float32"
    )
    with LLM("tiny", plan=layercast) as cast:
        assert np.array_equal(next(cast.logits(prompt)), exact)  # bfloat16 weights widen exactly
    assert 0 < np.abs(logits - exact).max() < 1


def test_an_estimate_is_near_the_truth(llm):
    estimate = LLM.estimate("tiny")
    assert estimate.weight_bytes == llm.weight_bytes
    assert estimate.cache_bytes == llm.cache_bytes
    assert estimate.max_context == llm.max_context == 2048


def test_no_torch_after_a_generation():
    code = (
        "import sys; from vivace import LLM, SamplingParams; "
        "LLM('tiny').generate('a', SamplingParams(max_tokens=2)); "
        "sys.exit(any(name.split('.')[0] in ('torch', 'transformers') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
