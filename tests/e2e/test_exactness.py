"""The same bits, however a request is run; and one unit in the last place is noticed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import random_llama, random_mixture

from vivace.engine import Engine, Limits, Request
from vivace.engine.sampling import Draw, Drawn, NativeSampler
from vivace.executors.native import NativeExecutor
from vivace.plan import DEFAULTS, Plan, resolve
from vivace.types import SamplingParams

PROMPT = [(i * i + 3 * i) % 97 for i in range(150)]
NUM_NEW = 24
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
WHOLE_NUMBERS = {
    "llama int4": (random_llama, {"name": "int4"}),
    "llama int3": (random_llama, {"name": "int3", "group_size": 64, "symmetric": False}),
    "mixture int8": (random_mixture, {"name": "int8"}),
}
COMPRESSED = {
    "llama mxfp4": (random_llama, {"name": "table", "preset": "mxfp4"}),
    "mixture codebook": (random_mixture, {"name": "codebook"}),
}
MODELS = (
    {
        f"{name} {dtype}": (make, {"name": dtype})
        for name, make in {"llama": random_llama, "mixture": random_mixture}.items()
        for dtype in ("float32", "bfloat16")
    }
    | WHOLE_NUMBERS
    | COMPRESSED
)


class RecordingSampler(NativeSampler):
    """Draws as the engine does, and keeps the hash of each row of logits it is shown."""

    def __init__(self, executor: NativeExecutor, prompt: list[int]) -> None:
        super().__init__(executor)
        self.prompt = prompt
        self.digests: dict[int, set[str]] = {}  # by position, of the request under test

    def draw(self, logits: np.ndarray, draws: Sequence[Draw]) -> list[Drawn]:
        for row, draw in zip(logits, draws, strict=True):
            if list(draw.token_ids[: len(self.prompt)]) == self.prompt:
                digest = hashlib.sha256(row.tobytes()).hexdigest()
                self.digests.setdefault(draw.key.position, set()).add(digest)
        return super().draw(logits, draws)


class Setup:
    """An engine over a random model, with what an axis varies as arguments."""

    def __init__(
        self,
        model: str,
        *,
        chunk: int,
        is_faulty: bool = False,
        threads: int = 1,
        block_size: int = 16,
        num_blocks: int = 1024,
        max_streams: int = 64,
        window: int | None = None,
        prompt: list[int] = PROMPT,
    ) -> None:
        make, weight_format = MODELS[model]
        is_bfloat16 = weight_format["name"] == "bfloat16"
        dtype = "bfloat16" if is_bfloat16 else "float32"
        sizes = {"intermediate_size": 128} if model in WHOLE_NUMBERS | COMPRESSED else {}
        graph, weights = make(dtype, max_position_embeddings=2048, **sizes)
        groups = tuple(replace(group, window=window) for group in graph.groups)
        graph = replace(graph, groups=groups)
        names = {"weight_formats": weight_format, "kv_stores": dtype}
        plan = Plan.of(schedulers={"name": "chunked", "chunk_size": chunk}, **names)
        resolved = resolve(plan.with_defaults(DEFAULTS))
        self.executor = NativeExecutor(
            graph,
            weights,
            resolved.one("weight_formats"),
            resolved.one("kv_stores"),
            threads=threads,
        )
        if is_faulty:
            self.executor.set_site(1, add_one_ulp(weight_format["name"]))
        self.sampler = RecordingSampler(self.executor, prompt)
        self.engine = Engine(
            self.executor,
            resolved,
            sampler=self.sampler,
            block_size=block_size,
            num_blocks=num_blocks,
            limits=Limits(max_streams=max_streams, max_rows=4096),
        )
        self.executor.fill_cache(255)  # NaN in every slot that nobody has written

    def run(self, *requests: Request) -> dict[int, set[str]]:
        for request in requests:
            self.engine.add(request)
        events = self.engine.run_until_done()
        assert all(event.error is None for event in events)
        return self.sampler.digests


def add_one_ulp(weight_format: str) -> Callable[[np.ndarray], None]:
    """A site that adds one unit in the last place to all rows but the first.

    That of float32, or where inputs are rounded, of bfloat16: the smallest that always shows.
    """
    step = 2.0 ** -(23 if weight_format == "float32" else 7)

    def site(x: np.ndarray) -> None:
        x[1:] += np.ldexp(np.float32(step), np.frexp(x[1:])[1] - 1)

    return site


def under_test(params: SamplingParams = PARAMS) -> Request:
    return Request.of(PROMPT, params)


def others(count: int) -> list[Request]:
    rng = np.random.default_rng(count)
    return [
        Request.of(
            rng.integers(0, 97, int(rng.integers(3, 90))).tolist(),
            SamplingParams(seed=i, max_tokens=int(rng.integers(2, 40))),
        )
        for i in range(count)
    ]


# Each axis runs the request in another way and returns the hashes of its logits by position.


def alone(model: str, fault: bool) -> dict[int, set[str]]:
    return Setup(model, chunk=1024, is_faulty=fault).run(under_test())


def batch_of(size: int) -> Callable[[str, bool], dict[int, set[str]]]:
    def run(model: str, fault: bool) -> dict[int, set[str]]:
        ahead, *behind = others(size - 1)
        return Setup(model, chunk=64, is_faulty=fault).run(ahead, under_test(), *behind)

    return run


def chunks_of(size: int) -> Callable[[str, bool], dict[int, set[str]]]:
    def run(model: str, fault: bool) -> dict[int, set[str]]:
        # A neighbour that decodes takes the first row, so that rows of a chunk are later ones.
        ahead = Request.of([5], SamplingParams(seed=1, max_tokens=400, ignore_eos=True))
        return Setup(model, chunk=size, is_faulty=fault).run(ahead, under_test())

    return run


def preempted(model: str, fault: bool) -> dict[int, set[str]]:
    setup = Setup(model, chunk=64, is_faulty=fault, num_blocks=15)
    ahead = Request.of(PROMPT[60::-1], SamplingParams(seed=1, max_tokens=60, ignore_eos=True))
    digests = setup.run(ahead, under_test())
    assert setup.engine.stats.num_preemptions > 0
    return digests


def from_prefix_cache(model: str, fault: bool) -> dict[int, set[str]]:
    setup = Setup(model, chunk=64, is_faulty=fault)
    setup.run(Request.of(PROMPT, SamplingParams(temperature=0, max_tokens=1)))
    digests = setup.run(under_test())
    assert setup.engine.stats.num_prefix_hit_tokens >= 128
    return digests


def forked(model: str, fault: bool) -> dict[int, set[str]]:
    setup = Setup(model, chunk=64, is_faulty=fault)

    async def explore() -> None:
        root = setup.engine.branch(Request.of(PROMPT[:-1], PARAMS))
        await root.score([1, 2, 3])  # puts the prompt into the cache
        child = root.fork()
        root.append([PROMPT[-1] ^ 1])
        await root.extend(max_tokens=2)
        child.append(PROMPT[-1:])
        await child.extend(max_tokens=NUM_NEW)

    asyncio.run(explore())
    return setup.sampler.digests


def two_threads(model: str, fault: bool) -> dict[int, set[str]]:
    return Setup(model, chunk=64, is_faulty=fault, threads=2).run(under_test())


def blocks_of_64(model: str, fault: bool) -> dict[int, set[str]]:
    return Setup(model, chunk=64, is_faulty=fault, block_size=64).run(under_test())


AXES = {
    "alone": alone,
    "batch 2": batch_of(2),
    "batch 7": batch_of(7),
    "batch 32": batch_of(32),
    "chunks of 1": chunks_of(1),
    "chunks of 7": chunks_of(7),
    "chunks of 64": chunks_of(64),
    "preempted": preempted,
    "prefix cache": from_prefix_cache,
    "forked": forked,
    "two threads": two_threads,
    "blocks of 64": blocks_of_64,
}


@pytest.fixture(scope="module")
def reference() -> Callable[[str], dict[int, set[str]]]:
    """One row at a time, alone, one thread, blocks of 16: no row has another beside it."""
    made: dict[str, dict[int, set[str]]] = {}

    def get(model: str) -> dict[int, set[str]]:
        if model not in made:
            made[model] = Setup(model, chunk=1, is_faulty=True).run(under_test())
            assert len(made[model]) == NUM_NEW
        return made[model]

    return get


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("axis", AXES)
def test_logits_have_the_same_bits(axis, model, reference):
    assert AXES[axis](model, False) == reference(model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("axis", AXES)
def test_one_unit_in_the_last_place_shows(axis, model, reference):
    """The tests above can fail: rows >= 1 of one linear are off by the least there is."""
    assert AXES[axis](model, True) != reference(model)


@pytest.mark.parametrize("window", [100, 1100])
def test_a_window_takes_no_bits_with_it(window: int) -> None:
    """Blocks that left the window are gone sooner or later: attention must not notice."""
    prompt = (PROMPT * 10)[:1500]
    request = Request.of(prompt, replace(PARAMS, max_tokens=8))

    def setup(chunk: int, num_blocks: int = 256) -> Setup:
        return Setup(
            "llama float32", chunk=chunk, window=window, prompt=prompt, num_blocks=num_blocks
        )

    expected = setup(2048).run(request)
    assert len(expected) == 8
    for chunk in (100, 300):
        assert setup(chunk).run(request) == expected
    cached = setup(300)
    cached.run(Request.of(prompt[:1450], replace(PARAMS, max_tokens=1)))
    assert cached.run(request) == expected
    assert cached.engine.stats.num_prefix_hit_tokens > 1400
    full = setup(300, 98)
    ahead = Request.of(prompt[60::-1], SamplingParams(seed=1, max_tokens=60, ignore_eos=True))
    assert full.run(ahead, request) == expected
    assert window < 1024 or full.engine.stats.num_preemptions > 0


def test_seeded_samples_do_not_depend_on_the_batch():
    params = SamplingParams(seed=7, temperature=1.5, top_p=0.95, n=3, max_tokens=NUM_NEW)

    def drawn(*neighbours: Request) -> dict[int, list[int]]:
        engine = Setup("llama float32", chunk=64).engine
        for request in neighbours:
            engine.add(request)
        request_id = engine.add(under_test(params))
        choices: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for event in engine.run_until_done():
            if event.request_id == request_id:
                choices[event.index] += event.token_ids
        return choices

    assert drawn() == drawn(*others(6))
    assert len({tuple(tokens) for tokens in drawn().values()}) == 3
