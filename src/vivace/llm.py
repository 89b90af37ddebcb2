"""The public Python API: a model, a plan, and the engine that runs one with the other."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from vivace.blocks import Role, matrix_roles
from vivace.completion import Choice, Collector, Completion, Delta, Timing
from vivace.engine.admission import check_request
from vivace.engine.engine import Engine
from vivace.engine.request import Event, Request, TokenLogprob
from vivace.engine.sampling import NativeSampler
from vivace.errors import BadFile, InvalidOption, InvalidRequest, QueueFull
from vivace.executors.native import NativeExecutor
from vivace.models.loading import LoadedModel, load_model
from vivace.models.matrices import matrix_formats, packed_bytes
from vivace.models.segmentation import Tokenization, check_tokenization
from vivace.models.weight_cache import cache_folder, packed_weights
from vivace.plan import DEFAULTS, Choices, Plan, ResolvedPlan, resolve
from vivace.registry import seams
from vivace.types import InputSegment, RequestKind, SamplingParams

if TYPE_CHECKING:
    from vivace.blocks import ModelGraph, WeightRef
    from vivace.engine.branch import Branch
    from vivace.models.tokenizer import Tokenizer
    from vivace.techniques.weight_formats.base import WeightFormat

__all__ = ["LLM", "Choice", "Completion", "Delta", "Estimate", "Timing", "weight_formats"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

_DEFAULT_CONTEXT = 8192  # tokens, where the model allows more: memory is for the user to spend
_WORKING_BYTES = 120 * 10**6  # the program, and what a step needs beside weights and cache


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory a model and plan will need."""

    weight_bytes: int
    cache_bytes: int
    working_bytes: int  # an upper bound
    max_context: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.working_bytes


class LLM:
    """A model that answers.

    Methods may be called from several threads; their requests share the engine's steps.

    Args:
        model: a directory, a GGUF file, `org/name` on the hub, or a shipped name.
        plan: which techniques run: a `Plan`, or the path of a TOML file; `None`: the exact default.
        weights: weight format, by name ("int4", "int4:group_size=64") or as a table with its
            options, or a list with those of some roles ("int2,head=int4" or ["int2", {"name":
            "int4", "role": "head"}]); in the place of what the plan says.
        kv: likewise the key/value store. By default both follow the checkpoint's type.
        threads: `None`: as many as this process may use.
        max_context: tokens of a sequence; `None`: the model's, but at most 8,192.
        cache_bytes: memory for keys and values; `None`: what two whole contexts need.
        isa: instruction set, at most what the machine has; `None`: the best one.
        tokenization: how texts become tokens: by the vocabulary's `merges`, or without them, the
            longest first (`greedy`) or the fewest (`shortest`).
        weight_cache: folder that keeps packed weights for the next start; `None`: the user's cache
            folder; "off": they are not kept.
    Raises:
        ModelError: the model cannot be loaded.
        UserError: the plan or an option is wrong.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        plan: Plan | str | Path | None = None,
        weights: Choices | None = None,
        kv: Choices | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        cache_bytes: int | None = None,
        isa: str | None = None,
        tokenization: Tokenization = "merges",
        weight_cache: str | Path | None = None,
    ) -> None:
        check_tokenization(tokenization)
        self.model: LoadedModel = load_model(model)
        is_own = tokenization == "merges"
        self._tokenizer = None if is_own else self.model.tokenizer.without_merges(tokenization)
        _check_whole("threads", threads, 1024)
        _check_whole("cache_bytes", cache_bytes, 2**60)
        self.plan = _resolve(self.model, plan, weights, kv)
        self.max_context = _context(self.graph, max_context)
        self.model.check_files()
        formats = weight_formats(self.graph, self.plan)
        packed = packed_weights(self.model, formats, cache_folder(weight_cache))
        executor = NativeExecutor(
            *packed,
            self.plan.one("weight_formats"),
            self.plan.one("kv_stores"),
            role_formats=_role_formats(self.plan),
            threads=threads,
            isa=isa,
            max_positions=self.max_context,
        )
        if packed[1] is not self.model.weights:
            self.model.weights.release()  # norms and biases, which the executor has copied
        self.engine = Engine(
            executor,
            self.plan,
            sampler=NativeSampler(executor),
            detokenizer=(lambda before: self.tokenizer.detokenizer(before))
            if self.model.has_tokenizer
            else None,
            eos_ids=sorted(self.model.eos_token_ids),
            max_context=self.max_context,
            cache_bytes=cache_bytes,
        )

    # ------------------------------------------------------------ what it is

    @property
    def graph(self) -> ModelGraph:
        return self.model.graph

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer or self.model.tokenizer

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices as the plan stores them, a tied head counted once."""
        return _weight_bytes(self.model, self.plan)

    @property
    def cache_bytes(self) -> int:
        return self.engine.cache_bytes

    @staticmethod
    def estimate(
        model: str | Path = "tiny",
        plan: Plan | str | Path | None = None,
        weights: Choices | None = None,
        kv: Choices | None = None,
        max_context: int | None = None,
        cache_bytes: int | None = None,
    ) -> Estimate:
        """The memory an `LLM` of these arguments will need; reads headers, no weights."""
        loaded = load_model(model)
        resolved = _resolve(loaded, plan, weights, kv)
        context = _context(loaded.graph, max_context)
        if cache_bytes is None:
            store = resolved.one("kv_stores")
            per_token = sum(store.layout(group).bytes_per_token for group in loaded.graph.groups)
            cache_bytes = 2 * context * per_token
        weight_bytes = _weight_bytes(loaded, resolved)
        return Estimate(weight_bytes, cache_bytes, _WORKING_BYTES, context)

    def default_params(self) -> SamplingParams:
        """What the checkpoint's generation config recommends."""
        config = self.model.generation_config.values
        if config.get("do_sample") is False:
            return SamplingParams(temperature=0)
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
        try:
            return SamplingParams(**{n: config[n] for n in names if config.get(n) is not None})
        except InvalidRequest as error:
            raise BadFile(f"{self.model.generation_config.source}: {error}") from error

    def close(self) -> None:
        """End all requests and take no more; the memory goes with this object."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------ answers

    @overload
    def generate(self, prompts: Prompt, params: SamplingParams | None = None) -> Completion: ...
    @overload
    def generate(
        self, prompts: list[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]: ...
    def generate(self, prompts: Any, params: SamplingParams | None = None) -> Any:
        """Continue a prompt, or each of a list of them, as one batch.

        A prompt is a text or a list of token ids. Raises `InvalidRequest`, `PromptTooLong`.
        """
        if _is_one(prompts):
            return self._complete([self._encode(prompts)], params)[0]
        return self._complete([self._encode(prompt) for prompt in prompts], params)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Answer a conversation: messages with `role` and `content`."""
        return self._complete([self._encode_chat(messages, tools)], params)[0]

    def stream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Generator[Delta]:
        """The answer piece by piece. Closing the iterator cancels the request."""
        request = self._request(self._prompt_or_chat(prompt, messages, tools), params)
        collector = Collector(request)
        self._submit(request, collector)
        try:
            is_done = False
            while not is_done:  # others may step the engine too, to the end
                self.engine.step()
                is_done = collector.is_done
                yield from collector.take_deltas()
        finally:
            self._drop(collector)

    async def agenerate(self, prompts: Any, params: SamplingParams | None = None) -> Any:
        """`generate` without blocking the event loop."""
        is_one = _is_one(prompts)
        batch = [self._encode(p) for p in ([prompts] if is_one else prompts)]
        done = await self._acomplete(batch, params)
        return done[0] if is_one else done

    async def achat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """`chat` without blocking the event loop."""
        return (await self._acomplete([self._encode_chat(messages, tools)], params))[0]

    async def astream(
        self,
        prompt: Prompt | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> AsyncIterator[Delta]:
        """`stream` without blocking the event loop."""
        request = self._request(self._prompt_or_chat(prompt, messages, tools), params)
        collector = Collector(request)
        async with aclosing(self.engine.driver.submit(request).events()) as events:
            async for event in events:
                collector.listen(event)
                for delta in collector.take_deltas():
                    yield delta

    def branch(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        max_total_tokens: int | None = None,
    ) -> Branch:
        """A branch to search from: fork, extend, score and drop it; see `vivace.engine.branch`.

        `max_total_tokens` bounds what the branch and all its forks generate together.
        """
        request = self._request(self._encode(prompt), params)
        return self.engine.branch(request, max_total_tokens=max_total_tokens)

    # ------------------------------------------------------------ measures

    def score(self, prompt: Prompt, continuation: Prompt | None = None) -> list[TokenLogprob]:
        """Log-probabilities of the continuation's tokens; without one, of the prompt's own
        tokens from the second on."""
        token_ids = self._encode(prompt)
        first = 1
        if continuation is not None:
            first = len(token_ids)
            is_text = isinstance(continuation, str)
            token_ids = token_ids + (
                self.tokenizer.encode(continuation, add_special=False)
                if is_text
                else _checked_ids(continuation)
            )
            if first == len(token_ids):
                return []
        event = self._run(Request.of(token_ids, kind=RequestKind.SCORE, first_scored=first))
        assert event.prompt_logprobs is not None
        return event.prompt_logprobs

    def embed(self, text: Prompt) -> np.ndarray:
        """The mean of the last hidden states after the final norm: [hidden_size] float32."""
        event = self._run(Request.of(self._encode(text), kind=RequestKind.EMBED))
        assert event.states is not None
        return event.states

    def hidden_states(self, prompt: Prompt, block: int | None = None) -> np.ndarray:
        """States after a block, by default after the final norm: [num_tokens, hidden] float32."""
        request = Request.of(self._encode(prompt), kind=RequestKind.HIDDEN, hidden_block=block)
        event = self._run(request)
        assert event.states is not None
        return event.states

    def logits(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """The raw logits after each token but the last, in blocks of rows: [rows, vocab] float32.

        Never more than a few rows are held at a time.
        """
        blocks: deque[np.ndarray] = deque()
        request = Request.of(
            _checked_ids(token_ids), kind=RequestKind.SCORE, on_logits=blocks.append
        )
        collector = Collector(request)
        self._submit(request, collector)
        try:
            is_done = False
            while not is_done:
                self.engine.step()
                is_done = collector.is_done
                while blocks:
                    yield blocks.popleft()
        finally:
            self._drop(collector)
        collector.check()

    # ------------------------------------------------------------ inside

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _checked_ids(prompt)
        return self.tokenizer.encode(prompt, max_tokens=self.max_context)

    def _encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        return self.tokenizer.encode_chat(messages, tools, max_tokens=self.max_context)

    def _prompt_or_chat(
        self,
        prompt: Prompt | None,
        messages: Sequence[Message] | None,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        if (prompt is None) == (messages is None):
            raise InvalidRequest("give either a prompt or messages")
        if messages is not None:
            return self._encode_chat(messages, tools)
        if tools is not None:
            raise InvalidRequest("tools go with messages, not with a prompt")
        assert prompt is not None
        return self._encode(prompt)

    def _request(self, token_ids: list[int], params: SamplingParams | None) -> Request:
        params = self.default_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is {params!r}: expected SamplingParams")
        return Request.of(token_ids, params)

    def _requests(
        self, prompts: Sequence[list[int]], params: SamplingParams | None
    ) -> list[Request]:
        """All or none: a batch with a prompt that the engine refuses never starts."""
        requests = [self._request(token_ids, params) for token_ids in prompts]
        for request in requests:
            check_request(self.engine, request, request.num_rows)
        return requests

    def _submit(self, request: Request, collector: Collector) -> None:
        collector.request_id = self.engine.add(request, collector.listen)

    def _drop(self, *collectors: Collector) -> None:
        going = [c.request_id for c in collectors if c.request_id is not None and not c.is_done]
        for request_id in going:
            self.engine.cancel(request_id)
        if going:
            self.engine.step()

    def _complete(
        self, prompts: Sequence[list[int]], params: SamplingParams | None
    ) -> list[Completion]:
        requests = self._requests(prompts, params)
        collectors = [Collector(request) for request in requests]
        waiting = deque(zip(requests, collectors, strict=True))
        going: list[Collector] = []
        try:
            while waiting or going:
                self._feed(waiting, going)
                self.engine.step()
                going = [collector for collector in going if not collector.is_done]
        finally:
            self._drop(*collectors)
        return [c.completion(p) for c, p in zip(collectors, prompts, strict=True)]

    def _feed(self, waiting: deque[tuple[Request, Collector]], going: list[Collector]) -> None:
        """Queue as much of a batch as fits; the rest waits for what is ahead of it."""
        while waiting:
            try:
                self._submit(*waiting[0])
            except QueueFull:
                if not going:
                    raise
                return
            going.append(waiting.popleft()[1])

    async def _acomplete(
        self, prompts: Sequence[list[int]], params: SamplingParams | None
    ) -> list[Completion]:
        requests = self._requests(prompts, params)
        collectors = [Collector(request) for request in requests]
        work = iter(zip(requests, collectors, strict=True))

        async def run_some() -> None:
            for request, collector in work:
                async with aclosing(self.engine.driver.submit(request).events()) as events:
                    async for event in events:
                        collector.listen(event)
                collector.check()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(requests), self.engine.limits.max_queued_requests)):
                    group.create_task(run_some())
        except BaseExceptionGroup as errors:  # the others have been cancelled
            raise errors.exceptions[0] from None
        return [c.completion(p) for c, p in zip(collectors, prompts, strict=True)]

    def _run(self, request: Request) -> Event:
        """The last event of a request that does not generate."""
        collector = Collector(request)
        self._submit(request, collector)
        try:
            while not collector.is_done:
                self.engine.step()
        finally:
            self._drop(collector)
        collector.check()
        assert collector.last is not None
        return collector.last


# ---------------------------------------------------------------- arguments


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt, not a list of them."""
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    if not isinstance(prompts, Sequence):
        raise InvalidRequest(
            f"a prompt is {prompts!r}: expected text, token ids, or a list of prompts"
        )
    return isinstance(prompts, str) or (
        len(prompts) > 0 and not isinstance(prompts[0], str | Sequence | np.ndarray)
    )


def _checked_ids(token_ids: Any) -> list[int]:
    return InputSegment.tokens(token_ids).data.tolist()


def _resolve(
    model: LoadedModel,
    plan: Plan | str | Path | None,
    weights: Choices | None,
    kv: Choices | None,
) -> ResolvedPlan:
    """The plan, with storage types over it, and the checkpoint's own where all are silent."""
    plan = plan if isinstance(plan, Plan) else Plan() if plan is None else Plan.load(plan)
    over = {"weight_formats": weights, "kv_stores": kv}
    given = Plan.from_dict({seam: value for seam, value in over.items() if value is not None})
    plan = dataclasses.replace(plan, choices=dict(plan.choices) | dict(given.choices))
    kv_store = "bfloat16" if model.dtype == "bfloat16" else "float32"
    defaults = DEFAULTS | {"weight_formats": model.weight_format, "kv_stores": kv_store}
    return resolve(plan.with_defaults(defaults))


def _context(graph: ModelGraph, max_context: int | None) -> int:
    if max_context is None:
        return min(graph.max_positions, _DEFAULT_CONTEXT)
    _check_whole("max_context", max_context, graph.max_positions)
    return max_context


def _check_whole(name: str, value: Any, high: int) -> None:
    if value is not None and not (type(value) is int and 1 <= value <= high):
        raise InvalidOption(f"{name} is {value!r}: expected a whole number from 1 to {high}")


def weight_formats(graph: ModelGraph, plan: ResolvedPlan) -> dict[WeightRef, WeightFormat]:
    """The format of every matrix. Raises `InvalidOption` for a role that no matrix has."""
    roles = set(matrix_roles(graph).values())
    for role in plan.by_role("weight_formats"):
        if role not in roles:
            raise InvalidOption(
                f"a weight format is given for the role '{role}', but the model's matrices are of "
                f"{', '.join(sorted(roles))} (a tied embedding is the head): leave it out"
            )
    return matrix_formats(graph, plan.one("weight_formats"), _role_formats(plan))


def _role_formats(plan: ResolvedPlan) -> dict[Role, WeightFormat]:
    """Formats of matrices that the body's does not store. Routers choose: they are not rounded."""
    formats = {Role(role): made for role, made in plan.by_role("weight_formats").items()}
    if Role.ROUTER not in formats and plan.one("weight_formats").grid.bits < 16:
        formats[Role.ROUTER] = seams()["weight_formats"].create("stored")
    return formats


def _weight_bytes(model: LoadedModel, plan: ResolvedPlan) -> int:
    """Bytes of all matrices as the plan stores them."""
    return packed_bytes(model.weights, weight_formats(model.graph, plan))
