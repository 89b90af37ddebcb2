"""The twelve decisions of day one: each exists as a type with a default, and does what it says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from native_cases import CachedSequence, executor, llama, run, step_of

from vivace.blocks import AttentionBlock, LinearSpec, MlpBlock, ModelGraph, Shard, WeightRef
from vivace.engine import Engine, Event, Request
from vivace.engine.sampling import NativeSampler
from vivace.errors import UnsupportedModel
from vivace.plan import DEFAULTS, Plan, resolve
from vivace.techniques.decoders.base import Progress
from vivace.techniques.schedulers.base import Budget, StreamView
from vivace.types import (
    CancelFlag,
    Demand,
    GroupRows,
    InputKind,
    InputSegment,
    Mask,
    MaskKind,
    Purpose,
    RandomKey,
    RequestKind,
    SamplingParams,
    Segment,
    Signals,
    Span,
    Step,
    StepOutput,
    Transactional,
    Wants,
)

TOKENS = [(7 * i + i * i) % 97 for i in range(40)]


def sequence_of(block_ids: list[int], tokens: list[int] = TOKENS) -> CachedSequence:
    return CachedSequence.of(tokens, block_ids)


def make_engine() -> Engine:
    graph, weights = llama()
    plan = resolve(Plan().with_defaults(DEFAULTS))
    native = executor(graph, weights, threads=1)
    return Engine(native, plan, sampler=NativeSampler(native), max_context=64)


def results_of(engine: Engine, request: Request) -> list[Event]:
    engine.add(request)
    return engine.run_until_done()


def test_1_a_model_is_a_list_of_blocks_over_flat_rows() -> None:
    graph, weights = llama()
    assert [type(block) for block in graph.blocks] == [AttentionBlock, MlpBlock] * 2
    with pytest.raises(FrozenInstanceError):
        setattr(graph, "blocks", ())  # noqa: B010
    native = executor(graph, weights)
    one, two = sequence_of([0, 1, 2]), sequence_of([3, 4], TOKENS[5:25])
    alone = [run(native, one, 40), run(native, two, 20)]
    native.fill_cache(255)
    together = native.forward(step_of(graph, [(two, 0, 20), (one, 0, 40)])).logits
    assert np.array_equal(together, np.concatenate([alone[1], alone[0]]))
    # Blocks may be left out and may differ.
    shorter = replace(graph, blocks=(graph.blocks[0], graph.blocks[3]))
    assert not np.array_equal(run(executor(shorter, weights), one, 40), alone[0])


def test_2_a_slot_is_not_a_position_is_not_a_token_index() -> None:
    graph, weights = llama(window=20)
    native = executor(graph, weights)
    expected = run(native, sequence_of([0, 1, 2]), 40)
    native.fill_cache(255)
    assert np.array_equal(run(native, sequence_of([9, 2, 30]), 40), expected), "slots show"
    # The last row reads a segment that starts at entry 16, which the shift tells.
    assert Segment(np.zeros(0, np.int32), 0).shift == 0
    step = step_of(graph, [(sequence_of([9, 2, 30]), 39, 40)])
    segment = Segment(np.array([2, 30], np.int32), 24, shift=16, mask=Mask(window=20))
    groups = (GroupRows(step.groups[0].slots, (Span(0, 1, (segment,)),)),)
    assert np.array_equal(native.forward(replace(step, groups=groups)).logits[0], expected[39])


def test_3_a_mask_is_data() -> None:
    rows = np.array([2, 3])
    assert Mask() == Mask(MaskKind.CAUSAL, window=0)
    seen = {
        kind: Mask(kind, block_size=2, span_start=2, span_end=4, tree=np.eye(2, dtype=bool))
        .allows(rows, 5, 0)
        .astype(int)
        .tolist()
        for kind in MaskKind
    }
    assert seen == {
        MaskKind.CAUSAL: [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        MaskKind.FULL: [[1] * 5] * 2,
        MaskKind.BLOCK_CAUSAL: [[1, 1, 1, 1, 0]] * 2,
        MaskKind.SPAN: [[1, 1, 1, 1, 0]] * 2,
        MaskKind.TREE: [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
        MaskKind.CROSS: [[1] * 5] * 2,
    }
    window = Mask(window=2, num_sinks=1).allows(np.array([4]), 5, 0)
    assert window.astype(int).tolist() == [[1, 0, 0, 1, 1]]


def test_4_a_step_is_a_transaction() -> None:
    graph, weights = llama()
    native = executor(graph, weights)
    sequence, wrong = sequence_of([0, 1, 2]), sequence_of([0, 1, 2], [*TOKENS[:20], *[5] * 20])
    expected = run(native, sequence, 40)
    native.fill_cache(255)
    run(native, sequence_of([0, 1, 2], TOKENS[:20]), 20)
    native.forward(step_of(graph, [(wrong, 20, 40)]))  # provisional rows that are not kept
    kept = native.forward(step_of(graph, [(sequence, 20, 40)])).logits
    assert np.array_equal(kept, expected[20:])
    assert {"fork", "commit", "export"} <= set(dir(Transactional))
    decoder = resolve(Plan().with_defaults(DEFAULTS)).one("decoders")
    progress = decoder.begin([1, 2, 3], 3)
    forked = decoder.fork(progress)
    forked.token_ids.append(4)
    assert isinstance(progress, Progress)
    assert progress.token_ids == [1, 2, 3]


def test_5_a_request_has_one_to_n_streams() -> None:
    assert SamplingParams().n == 1
    events = results_of(make_engine(), Request.of(TOKENS[:5], SamplingParams(n=3, max_tokens=4)))
    assert {event.index for event in events} == {0, 1, 2}
    assert [event.is_last for event in events].count(True) == 1


def test_6_a_forward_gives_what_is_wanted_and_can_be_cancelled() -> None:
    graph, weights = llama()
    native, sequence = executor(graph, weights), sequence_of([0, 1, 2])
    rows = np.array([3, 39], np.int32)
    nothing = native.forward(step_of(graph, [(sequence, 0, 40)], wants=Wants()))
    assert nothing.logits.shape == (0, graph.vocab_size)
    assert not nothing.hidden
    wants = Wants(
        logits_rows=rows,
        hidden={len(graph.blocks): rows[:1]},
        num_top_logits=5,
        attention_sums=True,
    )
    output = native.forward(step_of(graph, [(sequence, 0, 40)], wants=wants))
    assert np.array_equal(output.logits, run(native, sequence, 40)[rows])
    assert output.hidden[len(graph.blocks)].shape == (1, graph.hidden_size)
    assert output.top_ids is not None
    assert np.array_equal(output.top_ids, np.argsort(-output.logits, kind="stable")[:, :5])
    assert output.attention_sums is not None
    assert [sums[0].shape for sums in output.attention_sums] == [(4, 40)] * 2
    assert (Wants().first_block, Wants().last_block) == (0, None)
    cancel = CancelFlag()
    cancel.set()
    step = replace(step_of(graph, [(sequence, 0, 40)]), cancel=cancel)
    assert native.forward(step).is_cancelled
    assert not StepOutput(output.logits).is_cancelled


def test_7_an_input_segment_is_hashed_by_content() -> None:
    tokens = InputSegment.tokens([1, 2, 3])
    assert tokens.kind is InputKind.TOKENS
    assert tokens.content_hash() == InputSegment.tokens((1, 2, 3)).content_hash()
    data = np.zeros((2, 4), np.float32)
    others = [
        InputSegment.tokens([1, 2, 4]),
        InputSegment(InputKind.EMBEDDINGS, data),
        InputSegment(InputKind.FEATURES, data),
        InputSegment(InputKind.EMBEDDINGS, data.reshape(4, 2)),
        InputSegment(InputKind.EMBEDDINGS, data.astype(np.float64)[:, :2].copy()),
    ]
    hashes = {segment.content_hash() for segment in (tokens, *others)}
    assert len(hashes) == 6


def test_8_a_linear_is_a_group_of_parts_of_stored_units() -> None:
    graph, _ = llama()
    block = graph.blocks[0]
    assert isinstance(block, AttentionBlock)
    assert len(block.qkv.parts) == 3
    assert block.qkv.out_features == sum(part.shape[0] for part in block.qkv.parts)
    assert block.qkv.adapter_id == 0
    part = WeightRef("fused", (4, 8), first_row=12)
    spec = LinearSpec(8, (part, replace(part, first_row=0)), (None, None))
    assert spec.out_features == 8
    assert set(graph.linears()) >= set(block.qkv.parts)


def test_9_shapes_are_local_to_a_rank() -> None:
    graph, weights = llama()
    assert graph.shard == Shard(rank=0, world_size=1)
    with pytest.raises(UnsupportedModel, match="2 processes"):
        executor(replace(graph, shard=Shard(1, 2)), weights)
    assert "shard" in {field.name for field in fields(ModelGraph)}


def test_10_randomness_is_counter_based_and_keyed() -> None:
    key = RandomKey(0)
    # The known answer of Philox 4x32-10 for an all-zero key and counter.
    assert key.words() == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    others = [
        key,
        RandomKey(1),
        RandomKey(1 << 32),
        RandomKey(0, stream=1),
        RandomKey(0, position=1),
        RandomKey(0, position=1 << 32),
        RandomKey(0, purpose=Purpose.ACCEPT),
    ]
    assert len({other.words() for other in others}) == len(others)
    draws = [RandomKey(3, position=position).uniform() for position in range(2000)]
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert abs(np.mean(draws) - 0.5) < 0.03


def test_11_a_scheduler_answers_demands() -> None:
    assert Demand() == Demand(min_rows=1, max_rows=1, alignment=1, is_atomic=False)
    assert Signals().expected_tokens is None
    scheduler = resolve(Plan.of(schedulers={"name": DEFAULTS["schedulers"]})).one("schedulers")
    budget = Budget(max_rows=20, max_streams=4, free_blocks=100)

    def rows_of(*demands: Demand) -> dict[int, int]:
        views = [
            StreamView(i, i, 0, demand, True, 0, 0, Signals()) for i, demand in enumerate(demands)
        ]
        return dict(scheduler.schedule(views, budget))

    assert rows_of(Demand(max_rows=15), Demand(max_rows=15)) == {0: 15, 1: 5}
    assert rows_of(Demand(max_rows=50, alignment=8)) == {0: 16}
    assert rows_of(Demand(max_rows=50, is_atomic=True), Demand(max_rows=3)) == {1: 3}
    assert rows_of(Demand(max_rows=15), Demand(min_rows=6, max_rows=9)) == {0: 15}


def test_12_requests_may_score_embed_or_return_states() -> None:
    assert Request.of([1]).kind is RequestKind.GENERATE
    graph, weights = llama()
    engine, prompt = make_engine(), TOKENS[:20]
    hidden = results_of(engine, Request.of(prompt, kind=RequestKind.HIDDEN))[-1].states
    embedding = results_of(engine, Request.of(prompt, kind=RequestKind.EMBED))[-1].states
    lines = results_of(engine, Request.of(prompt, kind=RequestKind.SCORE))[-1].prompt_logprobs
    assert hidden is not None
    assert embedding is not None
    assert lines is not None
    assert hidden.shape == (20, graph.hidden_size)
    assert np.allclose(embedding, hidden.mean(0), atol=1e-5)
    logits = run(executor(graph, weights), sequence_of([0, 1], prompt), 20).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]
    logprobs -= logits.max(1, keepdims=True)
    expected = [logprobs[i, prompt[i + 1]] for i in range(19)]
    assert np.allclose([line.logprob for line in lines], expected, atol=1e-4)
    assert Step.__dataclass_fields__.keys() >= {"tokens", "positions", "groups", "wants"}
